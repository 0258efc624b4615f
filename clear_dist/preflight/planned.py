"""From a request to its plan: what memory it finds, and what it needs of it."""

from clear_dist.comm.env import Place
from clear_dist.config import Request
from clear_dist.planning import Gpu, Link, ModelSizes, PlanRequest

ON_CPU, ON_CUDA = "tiled", "flex"
"""The attention backends that `auto` chooses."""
SAME = (
    "height", "width", "cascade", "sampling", "upscaling", "window", "num_images", "dtype", "schedule",
    "warmup_steps", "hoist_modulation", "compile", "float8",
)  # fmt: skip
"""Fields that mean the same in both; a new flag that takes or saves memory goes here too."""


def of_request(request: Request, known: ModelSizes, gpu: Gpu | None, link: Link, place: Place) -> PlanRequest:
    """What is planned for a request whose size is known.

    Args:
        gpu: None: a CPU.
    """
    native = request.base_res or request.native_size
    assert native is not None, "known with the size"
    backend = request.attention_backend
    if backend == "auto":
        backend = ON_CPU if gpu is None else ON_CUDA
    elif backend == "flex" and gpu is None:
        backend = "reference"  # uncompiled it holds all scores, too
    return PlanRequest(
        **{name: getattr(request, name) for name in SAME},
        model=known,
        native=native,
        picture=None if request.picture is None else request.picture.size,
        ranks=request.world_size,
        gpu=gpu,
        link=link,
        text_tokens=request.max_sequence_length,
        text_attention=request.text_attention or ("exact" if request.window == "full" else "average"),
        backend=backend,
        forked=place.launcher is None,
    )
