"""Another architecture on stripes, without a change outside its folder: 1, 2 and 3 ranks against its unsplit self."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from clear_dist.comm.group import Group
from clear_dist.families import transformers
from clear_dist.options import Options
from clear_dist.parallelize import parallelize
from clear_dist.plan.built import cut_down
from clear_dist.plan.questions import Module, StepQuestion
from clear_dist.plan.stepped import run_steps
from tests.families.second.family import Second, draw_weights
from tests.families.second.transformer import (
    LATENTS,
    PATCH,
    TEXT_WIDTH,
    ImageProcessor,
    JointProcessor,
    SecondPipeline,
    SecondTransformer,
)
from tests.ranks import run_ranks

ROWS, COLUMNS, TEXT, STEPS, RADIUS = 7, 6, 5, 3, 3
PADDED = torch.tensor([[True] * 2 + [False] * 3, [True] * 4 + [False]])
"""A negative prompt of two tokens and a prompt of four."""


def pipeline() -> SecondPipeline:
    transformer = SecondTransformer()
    draw_weights(transformer)
    return SecondPipeline(transformer)


def draw(pipe: SecondPipeline) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    text = torch.randn(2, TEXT, TEXT_WIDTH, generator=generator)
    latents = torch.randn(1, LATENTS, PATCH * ROWS, PATCH * COLUMNS, generator=generator)
    return pipe(text, PADDED, latents, steps=STEPS)


@cache
def unsplit(radius: int | None) -> Tensor:
    """The stock processors, under a dense mask where there is a window."""
    pipe, hidden = pipeline(), None
    if radius is not None:
        row, column = torch.meshgrid(torch.arange(ROWS), torch.arange(COLUMNS), indexing="ij")
        rows, columns = row.flatten(), column.flatten()
        hidden = (rows[:, None] - rows) ** 2 + (columns[:, None] - columns) ** 2 >= radius**2
    for block in pipe.transformer.blocks:
        block.attn.set_processor(JointProcessor(hidden))
        block.attn2.set_processor(ImageProcessor(hidden))
    return draw(pipe)


@contextmanager
def known() -> Iterator[None]:
    """One row in the table of families."""
    with mock.patch.dict(transformers.TRANSFORMERS, {"SecondTransformer": Second}):
        yield


def on_stripes(group: Group, settings: list[dict[str, Any]]) -> list[Tensor]:
    drawn = []
    for options in settings:
        pipe = pipeline()
        with known():
            handle = parallelize(pipe, group=group, **options)
        drawn.append(draw(pipe))
        handle.undo()
        assert torch.equal(draw(pipe), unsplit(None)), "stock again"
    return drawn


FULL: dict[str, Any] = {"window": "full"}
WINDOW = {"window": RADIUS, "text_attention": "exact"}
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


@pytest.mark.parametrize("size", [1, 2, 3])
def test_n_ranks_draw_what_the_unsplit_model_draws(size: int) -> None:
    for latents in run_ranks(on_stripes, size, SETTINGS):
        for options, found in zip(SETTINGS, latents, strict=True):
            expected = unsplit(None if options["window"] == "full" else RADIUS)
            assert (found - expected).abs().max() < 1e-4 * expected.abs().max(), options
    assert (unsplit(None) - unsplit(RADIUS)).abs().max() > 1e-2 * unsplit(None).abs().max(), "the window matters"


def lagging(group: Group) -> list[Tensor]:
    pipes = [pipeline() for _ in range(2)]
    with known():
        for pipe in pipes:
            parallelize(pipe, group=group, schedule="stale", warmup_steps=1, **WINDOW)
    return [draw(pipe) for pipe in pipes]


def test_stale_halos_differ_and_are_equal_on_all_ranks() -> None:
    (first, again), (theirs, _) = run_ranks(lagging, 2)
    assert torch.equal(first, again) and torch.equal(first, theirs)
    assert first.isfinite().all()
    assert (first - unsplit(RADIUS)).abs().max() > 1e-4 * unsplit(RADIUS).abs().max()


COUNTED = ("halo_bytes_sent", "text_bytes_gathered", "text_bytes_reduced", "join_bytes")


def counted(group: Group, settings: dict[str, Any]) -> dict[str, int]:
    """Bytes of the last step."""
    pipe = pipeline()
    with known():
        handle = parallelize(pipe, group=group, **settings)
    draw(pipe)
    found = handle.counters.as_dict()
    return {name: int(found[name][-1]) for name in COUNTED}


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("settings", [FULL, WINDOW, WINDOW | {"schedule": "stale", "warmup_steps": 1}])
def test_it_has_a_plan_for_nothing(size: int, settings: dict[str, Any]) -> None:
    with known(), torch.device("meta"):
        built = cut_down(SecondTransformer())
    question = StepQuestion(
        module=Module(kind="tests.SecondTransformer", config={}),
        dtype="float32",
        device="cpu",
        ranks=size,
        options=Options(**{"text_attention": "exact"} | settings),
        transport="gloo",
        height=ROWS,
        width=COLUMNS,
        rank=0,
        images=2,
        text_tokens=TEXT,
        passes=1,
        down_factor=1,
        has_lora=False,
        steps=STEPS if settings.get("schedule") == "stale" else 1,
    )
    for rank, sent in enumerate(run_ranks(counted, size, settings)):
        with known():
            planned = run_steps(replace(question, rank=rank), built.copy())
        assert {name: planned["bytes"].get(name, 0) for name in COUNTED} == sent
        assert planned["peak"]["activations"] > 0


def test_an_unknown_transformer_is_refused() -> None:
    with pytest.raises(ValueError, match=r"the transformer must be one of .*, got SecondTransformer"):
        parallelize(pipeline(), window=RADIUS)
