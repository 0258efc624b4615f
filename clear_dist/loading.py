"""A FluxPipeline from a folder, quietly, with nothing missing from its weights."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import AutoencoderKL, FluxPipeline, FluxTransformer2DModel
from transformers import CLIPTextModel, T5EncoderModel

from clear_dist.config import Refusal, shortened

CUTTABLE = {"transformer": FluxTransformer2DModel, "vae": AutoencoderKL}
TEXT = {"text_encoder": CLIPTextModel, "text_encoder_2": T5EncoderModel}
NO_TEXT = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))


def load_pipeline(folder: Path, *, with_text_encoders: bool, dtype: torch.dtype, device: torch.device) -> FluxPipeline:
    """The pipeline of a folder in diffusers' layout, on `device`, its progress bars off.

    Args:
        with_text_encoders: without them the pipeline takes embeddings only.

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
    return pipe.to(device)


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
