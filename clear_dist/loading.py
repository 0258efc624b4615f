"""A FluxPipeline from a folder or the hub, quietly, with nothing missing from its weights."""

import logging
from collections.abc import Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import AutoencoderKL, FluxPipeline, FluxTransformer2DModel
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
from transformers import CLIPTextModel, T5EncoderModel

from clear_dist import preflight
from clear_dist.comm.group import Group
from clear_dist.config import FLUX_DEV, Refusal, Request, shortened

PARTS = ("transformer", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler")
WANTED = (
    "model_index.json",
    *(f"{part}/*.{ending}" for part in PARTS for ending in ("json", "safetensors", "txt", "model")),
)
CUTTABLE = {"transformer": FluxTransformer2DModel, "vae": AutoencoderKL}
TEXT = {"text_encoder": CLIPTextModel, "text_encoder_2": T5EncoderModel}
SECONDS_BETWEEN_WORDS = 1.0
NO_TEXT = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))


def locate(request: Request, group: Group, *, local_rank: int) -> Request:
    """The request with its model and CLEAR weights as local files, downloaded once per machine where they are not.

    Raises:
        Refusal: the hub has no such model or file, or does not give it to this user; or what it gave does not fit.
        RuntimeError: the hub cannot be reached.
    """
    checkpoint = request.clear_weights
    hub_checkpoint = checkpoint if checkpoint is not None and not Path(checkpoint).exists() else None
    if request.from_folder and hub_checkpoint is None:
        return request
    fetching = None
    if local_rank == 0:
        fetching = ThreadPoolExecutor(1).submit(_fetch, request, hub_checkpoint, offline=False)
    # A download may take longer than a group waits for a rank that is silent, so the ranks keep in touch meanwhile.
    while group.agree(_is_underway(fetching)):
        pass
    folder, checkpoint_file = _fetch(request, hub_checkpoint, offline=True)
    if not request.from_folder:
        return preflight.located(request, folder, checkpoint_file or checkpoint)
    return replace(request, clear_weights=checkpoint_file)


def load_pipeline(
    folder: Path,
    *,
    with_text_encoders: bool,
    dtype: torch.dtype,
    device: torch.device,
    on_host: Collection[str] = (),
) -> FluxPipeline:
    """The pipeline of a folder in diffusers' layout, on `device`, its progress bars off.

    Args:
        with_text_encoders: without them the pipeline takes embeddings only.
        on_host: names of parts that stay in host memory.

    Raises:
        Refusal: weights are missing, or do not fit their configuration.
    """
    kinds = CUTTABLE | TEXT if with_text_encoders else CUTTABLE
    with _quietly():
        parts = {name: _load_part(kind, folder, name, dtype) for name, kind in kinds.items()}
        without: dict[str, Any] = {} if with_text_encoders else NO_TEXT
        try:
            pipe: Any = FluxPipeline.from_pretrained(folder, **without, **parts, dtype=dtype, local_files_only=True)
        except Exception as error:  # what the tokenizers' library raises is of no other class
            raise _unloadable(folder, "the tokenizers and the scheduler of a FluxPipeline", error) from error
    pipe.set_progress_bar_config(disable=True)
    for name, part in pipe.components.items():
        if isinstance(part, torch.nn.Module) and name not in on_host:
            part.to(device)
    return pipe


def cut_off(pipe: Any, prompt: str, max_sequence_length: int) -> list[str]:
    """What the encoders do not see of a prompt, a line for each encoder that it is too long for."""
    lines = []
    for name, tokenizer, most in (
        ("CLIP", pipe.tokenizer, pipe.tokenizer_max_length),
        ("T5", pipe.tokenizer_2, max_sequence_length),
    ):
        ids = tokenizer(prompt, truncation=False, verbose=False).input_ids
        if len(ids) > most:
            # The last place goes to the token that ends a prompt.
            rest = tokenizer.decode(ids[most - 1 :], skip_special_tokens=True).strip()
            lines.append(
                f"the prompt is longer than the {most} tokens that {name} takes here; cut off: {shortened(rest)!r}"
            )
    return lines


def _load_part(kind: Any, folder: Path, name: str, dtype: torch.dtype) -> Any:
    try:
        part, info = kind.from_pretrained(
            folder,
            subfolder=name,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # to name the tensor ourselves
            dtype=dtype,
        )
    except Exception as error:  # for a damaged configuration the libraries raise what they like
        raise _unloadable(folder / name, kind.__name__, error) from error
    for tensor in sorted(info["missing_keys"]):
        raise Refusal(f"{folder / name} lacks {tensor}; are these the weights of another model?")
    for tensor, got, expected in sorted(info.get("mismatched_keys", ())):
        raise Refusal(
            f"{tensor} must have the shape {list(expected)}, got {list(got)} in {folder / name}; "
            "are these the weights of another model?"
        )
    return part


def _unloadable(folder: Path, kind: str, error: Exception) -> Refusal:
    why = " ".join(str(error).split()) or type(error).__name__
    return Refusal(f"{folder} must hold what can be loaded as {kind}, and does not ({why}); download it again")


def _fetch(request: Request, hub_checkpoint: str | None, *, offline: bool) -> tuple[Path, str | None]:
    """The folder of the model, and the file of a checkpoint that lies on the hub."""
    what = request.model
    try:
        folder = Path(what)
        if not request.from_folder:
            folder = Path(
                snapshot_download(
                    what, revision=request.revision, allow_patterns=list(WANTED), local_files_only=offline
                )
            )
        if hub_checkpoint is None:
            return folder, None
        what = hub_checkpoint
        repository, file = hub_checkpoint.split(":", 1)
        return folder, hf_hub_download(repository, file, local_files_only=offline)
    except GatedRepoError as error:
        raise Refusal(
            f"the hub gives {what} only to users who accepted its licence: do so on its page, then `hf auth login`; "
            "nearest: --model FOLDER"
        ) from error
    except (RepositoryNotFoundError, RevisionNotFoundError, EntryNotFoundError) as error:
        if isinstance(error.__cause__, OSError) or type(error).__name__ == "LocalEntryNotFoundError":
            raise _unreachable(what) from error
        raise Refusal(
            f"the hub has no {what}, or does not show it to you (`hf auth login`); nearest: {FLUX_DEV}"
        ) from error
    except OSError as error:
        raise _unreachable(what) from error


def _is_underway(fetching: Future[tuple[Path, str | None]] | None) -> bool:
    """Whether there is more to fetch, a moment later; raises what fetching raised."""
    if fetching is None:
        return False
    wait([fetching], SECONDS_BETWEEN_WORDS)
    if not fetching.done():
        return True
    fetching.result()
    return False


def _unreachable(what: str) -> RuntimeError:
    return RuntimeError(
        f"cannot get {what} from the hub: check the network and `hf auth login`, or pass local files "
        "(--model FOLDER, --clear-weights FILE)"
    )


@contextmanager
def _quietly() -> Iterator[None]:
    """The libraries' progress bars and warnings are for those who call them themselves."""
    verbosity = diffusers.utils.logging.get_verbosity(), transformers.utils.logging.get_verbosity()
    bars = diffusers.utils.logging.is_progress_bar_enabled(), transformers.utils.logging.is_progress_bar_enabled()
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity(logging.ERROR)
        library.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        for library, level, bar in zip((diffusers, transformers), verbosity, bars, strict=True):
            library.utils.logging.set_verbosity(level)
            if bar:
                library.utils.logging.enable_progress_bar()
