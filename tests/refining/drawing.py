"""A cascade of a tiny pipeline on N ranks, stage by stage."""

from functools import cache
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import clear_dist
from clear_dist.comm.counters import Counters
from clear_dist.comm.group import Group
from clear_dist.drawing.cascade import SEED_STRIDE, Cascade
from clear_dist.drawing.prompts import encode_prompts
from clear_dist.engine.striped import require_striped
from clear_dist.families.transformers import adapter_of
from clear_dist.stages import Stage
from tests.refining.reference import NATIVE, TEXT, Reference
from tests.tiny import make_tiny_pipeline

SEED, PROMPT = 11, "a hill"
Drawn = list[tuple[Tensor | None, Tensor | None]]
"""Latents and one rank's pixels of each stage; None where it was idle."""


def cascade_of(
    pipe: Any, group: Group, *, negative: str | None = None, text: int = TEXT, **options: Any
) -> tuple[Cascade, Counters]:
    """A cascade of a pipeline that is put on stripes, and what it sends."""
    pipe.set_progress_bar_config(disable=True)
    clear_dist.parallelize(pipe, group=group, **options)
    counters = require_striped(pipe).counters
    texts: dict[str, Any] = {"negative_prompts": None if negative is None else [negative]}
    embeddings = encode_prompts(adapter_of(pipe), group, counters, [PROMPT], max_sequence_length=text, **texts)
    return Cascade(pipe, embeddings, seed=SEED), counters


def drawn(group: Group, stages: tuple[Stage, ...], **how: Any) -> Drawn:
    cascade, _ = cascade_of(make_tiny_pipeline(sample_size=NATIVE), group, **how)
    return [(each.latents, each.pixels) for each in cascade.run(stages)]


def counted(group: Group, stages: tuple[Stage, ...], **how: Any) -> dict[str, list[Any]]:
    """Bytes of each step, all stages one after another; of the last step those that follow it, too."""
    cascade, counters = cascade_of(make_tiny_pipeline(sample_size=NATIVE), group, **how)
    for _ in cascade.run(stages):
        pass
    return counters.as_dict()


def picture_of(ranks: list[Drawn], stage: int) -> Image.Image:
    """A stage's picture."""
    pixels = torch.cat([found[stage][1] for found in ranks if found[stage][1] is not None], dim=2)
    return Image.fromarray(np.ascontiguousarray(pixels[0].permute(1, 2, 0).numpy()))


def seed_of(stage: int) -> int:
    return (SEED + stage * SEED_STRIDE) % 2**63


@cache
def reference(radius: int, **how: Any) -> Reference:
    return Reference(make_tiny_pipeline(sample_size=NATIVE), PROMPT, radius=radius, theta=100_000.0, **how)


def relative_error(result: Tensor, expected: Tensor) -> float:
    return ((result - expected).norm() / expected.norm()).item()
