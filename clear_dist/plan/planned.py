"""From a request to its plan: what memory it finds, and what it needs of it."""

import os
from math import prod
from pathlib import Path

from clear_dist.cards.headers import read_shapes
from clear_dist.launch.env import Place
from clear_dist.plan import Gpu, Link, ModelSizes, PlanRequest
from clear_dist.request.lora import TEXT_ENCODER
from clear_dist.request.request import Lora, Request

SAME = (
    "height", "width", "cascade", "sampling", "upscaling", "window", "num_images", "dtype", "schedule",
    "warmup_steps", "hoist_modulation", "compile", "float8", "int8", "shard_weights", "offload", "keep_text_encoder",
    "down_factor",
)  # fmt: skip
"""Fields that mean the same in both; a new flag that takes or saves memory goes here too."""


def of_request(request: Request, known: ModelSizes, gpu: Gpu | None, link: Link, place: Place) -> PlanRequest:
    """What is planned for a request whose size is known.

    Args:
        gpu: None: a CPU.
    """
    native = request.base_res or request.native_size
    assert native is not None, "known with the size"
    return PlanRequest(
        **{name: getattr(request, name) for name in SAME},
        model=known,
        native=native,
        picture=None if request.picture is None else request.picture.size,
        ranks=request.world_size,
        gpu=gpu,
        link=link,
        text_tokens=request.max_sequence_length,
        text_sharding=request.text_tokens,
        text_attention=request.text_attention or ("exact" if request.window == "full" else "average"),
        backend=request.attention_backend,
        lora_numbers=sum(map(_numbers, request.loras)),
        forked=place.launcher is None,
    )


def _numbers(lora: Lora) -> int:
    """Of the weights that it adds to the transformer; 0 where its file is not here yet."""
    if not os.path.isfile(lora.source):
        return 0
    shapes = read_shapes(Path(lora.source))
    return sum(prod(shape) for name, shape in shapes.items() if not name.startswith(TEXT_ENCODER))
