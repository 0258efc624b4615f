"""SD3 on stripes against unmodified diffusers, and windows against dense masks in it: 1e-4 relative, in float32."""

from functools import cache
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from clear_dist.comm.group import Group
from clear_dist.parallelize import parallelize
from tests.families.sd3.oracle import DenseProcessor
from tests.families.sd3.tiny import KINDS, POOLED_WIDTHS, TEXT_WIDTH, Kind, make_tiny_pipeline
from tests.ranks import run_ranks
from tests.test_parallelize import relative_error

ROWS, COLUMNS, TEXT, STEPS, RADIUS = 7, 6, 5, 2, 3
"""Rows that no number of ranks divides; on five ranks stripes are thinner than a halo."""
FULL: dict[str, Any] = {"window": "full"}
WINDOW: dict[str, Any] = {"window": RADIUS, "text_attention": "exact"}
SETTINGS = [
    FULL,
    WINDOW,
    FULL | {"text_tokens": "sharded"},
    WINDOW | {"text_tokens": "sharded"},
    WINDOW | {"shard_weights": True, "hoist_modulation": True, "offload": True},
    WINDOW | {"schedule": "stale", "warmup_steps": STEPS},
    FULL | {"cut": "columns"},
    WINDOW | {"cut": "columns", "text_tokens": "sharded"},
    WINDOW | {"cut": "columns", "schedule": "stale", "warmup_steps": STEPS},
]


def draw(pipe: Any, *, rows: int = ROWS, columns: int = COLUMNS, steps: int = STEPS, guidance: float = 4.0) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    shapes = ((1, TEXT, TEXT_WIDTH), (1, sum(POOLED_WIDTHS))) * 2
    text, pooled, other, other_pooled = (torch.randn(shape, generator=generator) for shape in shapes)
    return pipe(
        prompt_embeds=text,
        pooled_prompt_embeds=pooled,
        negative_prompt_embeds=other,
        negative_pooled_prompt_embeds=other_pooled,
        height=16 * rows,
        width=16 * columns,
        num_inference_steps=steps,
        guidance_scale=guidance,
        generator=generator,
        output_type="latent",
    ).images


@cache
def unsplit(kind: Kind, radius: int | None) -> Tensor:
    pipe = make_tiny_pipeline(kind)
    if radius is not None:
        pipe.transformer.set_attn_processor(DenseProcessor(ROWS, COLUMNS, radius))
    return draw(pipe)


def on_stripes(group: Group, kind: Kind, settings: list[dict[str, Any]]) -> list[Tensor]:
    torch.use_deterministic_algorithms(True)  # fills what torch.empty returns with NaN
    drawn = []
    for options in settings:
        pipe = make_tiny_pipeline(kind)
        handle = parallelize(pipe, group=group, **options)
        drawn.append(draw(pipe))
        handle.undo()
        assert torch.equal(draw(pipe), unsplit(kind, None)), "stock again"
    return drawn


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_n_ranks_draw_what_the_unsplit_model_draws(kind: Kind, size: int) -> None:
    for latents in run_ranks(on_stripes, size, kind, SETTINGS):
        for options, found in zip(SETTINGS, latents, strict=True):
            expected = unsplit(kind, None if options["window"] == "full" else RADIUS)
            assert relative_error(found, expected) < 1e-4, options
    assert relative_error(unsplit(kind, RADIUS), unsplit(kind, None)) > 1e-2, "the window matters"


def with_a_scheduler_of_the_users(group: Group | None, options: dict[str, Any]) -> list[Tensor]:
    """One picture, the same again, and one of another size, the scheduler replaced after `parallelize`."""
    pipe = make_tiny_pipeline()
    if group is not None:
        parallelize(pipe, group=group, **options)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=2.0)
    return [
        pipe(
            "a hill",
            height=height,
            width=96,
            num_inference_steps=3,
            guidance_scale=2.0,
            generator=torch.Generator().manual_seed(1),
            output_type="latent",
        ).images
        for height in (112, 112, 144)
    ]


def test_generations_are_told_apart_by_the_scheduler_that_the_pipeline_has_now() -> None:
    expected = with_a_scheduler_of_the_users(None, {})
    for latents in run_ranks(with_a_scheduler_of_the_users, 2, {"window": "full"}):
        for found, stock in zip(latents, expected, strict=True):
            assert relative_error(found, stock) < 1e-4
    stale = {"window": 3, "schedule": "stale", "warmup_steps": 1}
    for first, again, _ in run_ranks(with_a_scheduler_of_the_users, 2, stale):
        assert torch.equal(first, again)
