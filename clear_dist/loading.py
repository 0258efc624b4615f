"""A FluxPipeline from a folder or the hub, quietly, with nothing missing from its weights."""

import gc
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxPipeline
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

from clear_dist import preflight
from clear_dist.comm.group import Group
from clear_dist.comm.in_touch import in_touch
from clear_dist.components import CUTTABLE, TEXT, load_part, quietly, unloadable
from clear_dist.config import FLUX_DEV, Refusal, Request, shortened
from clear_dist.progress import Phases

PARTS = ("transformer", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler")
WANTED = (
    "model_index.json",
    *(f"{part}/*.{ending}" for part in PARTS for ending in ("json", "safetensors", "txt", "model")),
)
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
    fetch = partial(_fetch, request, hub_checkpoint)
    in_touch(group, partial(fetch, offline=False) if local_rank == 0 else lambda: None)
    folder, checkpoint_file = fetch(offline=True)
    if not request.from_folder:
        return preflight.located(request, folder, checkpoint_file or checkpoint)
    return replace(request, clear_weights=checkpoint_file)


def load_pipeline(
    folder: Path,
    *,
    with_text_encoders: bool,
    dtype: torch.dtype,
    device: torch.device,
    phases: Phases | None = None,
) -> FluxPipeline:
    """The pipeline of a folder in diffusers' layout, on `device`, its progress bars off.

    Args:
        with_text_encoders: without them the pipeline takes embeddings only.
        phases: where the parts are timed, and shown.

    Raises:
        Refusal: weights are missing, or do not fit their configuration.
    """
    names = (*TEXT, *CUTTABLE) if with_text_encoders else CUTTABLE
    without = {} if with_text_encoders else NO_TEXT
    return _assemble(folder, names, without, dtype, device, phases or Phases())


def load_text_pipeline(folder: Path, *, dtype: torch.dtype, device: torch.device, phases: Phases) -> FluxPipeline:
    """As `load_pipeline`, with all that encodes prompts and nothing else."""
    return _assemble(folder, TEXT, dict.fromkeys(CUTTABLE), dtype, device, phases)


def free(device: torch.device) -> None:
    """Give back what was dropped: to other processes, and to what is loaded next."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


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


def _assemble(
    folder: Path,
    names: Iterable[str],
    without: Mapping[str, None],
    dtype: torch.dtype,
    device: torch.device,
    phases: Phases,
) -> FluxPipeline:
    with quietly():
        parts = {name: load_part(folder, name, dtype, device, phases) for name in names}
        try:
            pipe: Any = FluxPipeline.from_pretrained(folder, **without, **parts, dtype=dtype, local_files_only=True)
        except Exception as error:  # what the tokenizers' library raises is of no other class
            raise unloadable(folder, "the tokenizers and the scheduler of a FluxPipeline", error) from error
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


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


def _unreachable(what: str) -> RuntimeError:
    return RuntimeError(
        f"cannot get {what} from the hub: check the network and `hf auth login`, or pass local files "
        "(--model FOLDER, --clear-weights FILE)"
    )
