"""What a request will take, from numbers alone: stripes, memory, bytes, time. No torch, no GPU, no network.

    request  a frozen PlanRequest; a new flag is a field there
    memory   what a rank holds in each phase: weights, blocks (blocks.py), kernels (kernels.py), the VAE (vae.py)
    traffic  bytes handed over; counts.py has the exact formulas, which benchmarks use too
    timing   work over assumed rates
    fits     does it fit, and if not, what does

Tests count the same on real tensors; where an estimate is assumed and not counted, the constant says so.
"""

from clear_dist.plan.fits import Change, Plan, Room, changes, nearest
from clear_dist.plan.model import ModelSizes, TextSizes, VaeSizes
from clear_dist.plan.request import PlanRequest
from clear_dist.request.hardware import GPUS, LINKS, Gpu, Link

__all__ = [
    "GPUS",
    "LINKS",
    "Change",
    "Gpu",
    "Link",
    "ModelSizes",
    "Plan",
    "PlanRequest",
    "Room",
    "TextSizes",
    "VaeSizes",
    "changes",
    "nearest",
]
