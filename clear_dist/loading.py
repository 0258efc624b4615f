"""A FluxPipeline from a folder, quietly, with nothing missing from its weights."""

import gc
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxPipeline

from clear_dist.components import CUTTABLE, TEXT, load_part, quietly, unloadable
from clear_dist.config import shortened
from clear_dist.progress import Phases

HOST = torch.device("cpu")
NO_TEXT = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))


def load_pipeline(
    folder: Path,
    *,
    with_text_encoders: bool,
    dtype: torch.dtype,
    device: torch.device,
    on_host: Collection[str] = (),
    phases: Phases | None = None,
) -> FluxPipeline:
    """The pipeline of a folder in diffusers' layout, on `device`, its progress bars off.

    Args:
        with_text_encoders: without them the pipeline takes embeddings only.
        on_host: names of parts that stay in host memory.
        phases: where the parts are timed, and shown.

    Raises:
        Refusal: weights are missing, or do not fit their configuration.
    """
    names = (*TEXT, *CUTTABLE) if with_text_encoders else CUTTABLE
    without = {} if with_text_encoders else NO_TEXT
    places = {name: HOST if name in on_host else device for name in names}
    return _assemble(folder, places, without, dtype, phases or Phases())


def load_text_pipeline(folder: Path, *, dtype: torch.dtype, device: torch.device, phases: Phases) -> FluxPipeline:
    """As `load_pipeline`, with all that encodes prompts and nothing else."""
    return _assemble(folder, dict.fromkeys(TEXT, device), dict.fromkeys(CUTTABLE), dtype, phases)


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
    places: Mapping[str, torch.device],
    without: Mapping[str, None],
    dtype: torch.dtype,
    phases: Phases,
) -> FluxPipeline:
    with quietly():
        parts = {name: load_part(folder, name, dtype, place, phases) for name, place in places.items()}
        try:
            pipe: Any = FluxPipeline.from_pretrained(folder, **without, **parts, dtype=dtype, local_files_only=True)
        except Exception as error:  # what the tokenizers' library raises is of no other class
            raise unloadable(folder, "the tokenizers and the scheduler of a FluxPipeline", error) from error
    pipe.set_progress_bar_config(disable=True)
    return pipe
