"""Work and traffic of FLUX.1-dev and of the stripes that benchmarks run, as clear_dist/plan/counts.py counts them."""

from clear_dist.options import Window
from clear_dist.plan.counts import (
    Grid,
    Model,
    Part,
    Traffic,
    attended_pairs,
    attention_work,
    circle_pairs,
    linear_work,
    traffic,
)

__all__ = [
    "FLUX",
    "TOKEN",
    "Grid",
    "Model",
    "Part",
    "Traffic",
    "Window",
    "attended_pairs",
    "attention_work",
    "circle_pairs",
    "gathering_over_halos",
    "linear_work",
    "middle_part",
    "traffic",
]

TOKEN = 16
"""Pixels along the side of a token."""

FLUX = Model(double_blocks=19, single_blocks=38, heads=24, head_dim=128, text_tokens=512, itemsize=2)
"""FLUX.1-dev in bfloat16."""


def middle_part(side: int, ranks: int, window: Window) -> Part:
    """The middle stripe of a square of `side` pixels: with 3 ranks or more it has a neighbour on both sides."""
    return Part(grid=(side // TOKEN, side // TOKEN), ranks=ranks, rank=ranks // 2, window=window)


def gathering_over_halos(model: Model, side: int, ranks: int, radius: int) -> float:
    """Bytes of a step through a rank's link if all keys and values are gathered, over those with halos."""
    window, full = (traffic(model, middle_part(side, ranks, kind), "sync") for kind in (radius, "full"))
    return (full.in_layers + full.at_the_end) / (window.in_layers + window.at_the_end)
