"""A tiny random model: N ranks against one and against stock diffusers, warm-up against the sync schedule."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from clear_dist.comm.group import Group
from clear_dist.engine.family import Sample
from clear_dist.verify.attention import half_of
from clear_dist.verify.dense import largest_error
from clear_dist.verify.finding import Finding, Subjects

COLUMNS, LEAST_ROWS, RADIUS = 9, 13, 4
TOLERANCE, BFLOAT16_TOLERANCE = 1e-4, 5e-2
"""bfloat16 rounds each of some hundred operations by up to 2^-9, and N ranks add in another order than one: on a CPU
the largest difference was 0.5 to 0.9 per cent of the largest latent."""


def verify_model(sample: Sample, group: Group, subjects: Subjects) -> Iterator[Finding]:
    """Each comparison draws the same latents in two ways; the one rank compared with takes the reference backend."""
    grid, model = (max(LEAST_ROWS, 2 * group.size + 1), max(COLUMNS, group.size)), f"tiny {sample.name}"
    ranks = f"{group.size} rank{'s' * (group.size > 1)}"
    pipe = sample.pipeline(group.device, torch.float32)

    def stripes(**settings: Any) -> Tensor:
        # Not `auto`, which on a GPU compiles a kernel for each size of stripe and halo; see attention.py.
        return _on_stripes(sample, pipe, grid, group, subjects, attention_backend="tiled", **settings)

    def finding(name: str, found: Tensor, expected: Tensor, tolerance: float) -> Finding:
        error = largest_error(found, expected)
        figure = f"{grid[0]} x {grid[1]} tokens, {sample.steps} steps"
        fault = f"latents are off by {error:.2g} of the largest"
        return Finding(name=f"{model}, {name}", error=error, tolerance=tolerance, figure=figure, fault=fault)

    stock = _from_first(group, sample.draw(pipe, grid) if group.rank == 0 else None)
    yield finding(f"full attention, {ranks} against diffusers", stripes(window="full"), stock, TOLERANCE)
    alone = _drawn_alone(sample, pipe, grid, group, subjects)
    exact = stripes(window=RADIUS, text_attention="exact")
    yield finding(f"exact, {ranks} against one, float32", exact, alone, TOLERANCE)
    by_columns = stripes(window=RADIUS, text_attention="exact", cut="columns")
    yield finding(f"exact, {ranks} by columns against one", by_columns, alone, TOLERANCE)
    warm_up = stripes(window=RADIUS, text_attention="exact", schedule="stale", warmup_steps=sample.steps)
    yield finding("stale in warm-up against sync", warm_up, exact, 0.0)

    half = half_of(group)
    pipe = sample.pipeline(group.device, half)
    alone = _drawn_alone(sample, pipe, grid, group, subjects)
    exact = stripes(window=RADIUS, text_attention="exact")
    yield finding(f"exact, {ranks} against one, {str(half).removeprefix('torch.')}", exact, alone, BFLOAT16_TOLERANCE)


def _on_stripes(
    sample: Sample, pipe: Any, grid: tuple[int, int], group: Group, subjects: Subjects, **settings: Any
) -> Tensor:
    parallelized = subjects.parallelize(pipe, group=group, **settings)
    try:
        return sample.draw(pipe, grid)
    finally:
        parallelized.undo()


def _drawn_alone(sample: Sample, pipe: Any, grid: tuple[int, int], group: Group, subjects: Subjects) -> Tensor:
    apart = group.split(1)
    drawn = None
    if group.rank == 0:
        settings = {"window": RADIUS, "text_attention": "exact", "attention_backend": "reference"}
        drawn = _on_stripes(sample, pipe, grid, apart, subjects, **settings)
    latents = _from_first(group, drawn)
    apart.close()
    return latents


def _from_first(group: Group, latents: Tensor | None) -> Tensor:
    (theirs,) = group.broadcast_tensors([latents] if group.rank == 0 else None)
    assert theirs is not None, "rank 0 has drawn"
    return theirs
