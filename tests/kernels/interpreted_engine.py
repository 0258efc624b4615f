"""The whole engine with all Triton kernels, on N ranks, as on GPUs; `test_engine.py` runs it in the interpreter."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from clear_dist import kernels
from clear_dist.comm.group import Group
from clear_dist.parallelize import parallelize
from tests.engine import test_pooled_keys, test_stale
from tests.oracle import DenseClearProcessor
from tests.ranks import run_ranks
from tests.stale_oracle import stripes_of
from tests.test_parallelize import relative_error, run
from tests.tiny import make_clear_weights, make_tiny_pipeline

HEIGHT, WIDTH, RADIUS = 13, 11, 4
SIZE = {"height": HEIGHT, "width": WIDTH, "steps": 1}
KERNELS = {"attention_backend": "triton"}
WINDOW: dict[str, Any] = {"window": RADIUS, **KERNELS}
EXACT, AVERAGE = ({"text_attention": attention, **WINDOW} for attention in ("exact", "average"))
SHARED = {"text_tokens": "sharded"}
"""9 text tokens: uneven shares on 2 and 5 ranks."""
ON_RANKS: dict[int, list[dict[str, Any]]] = {
    1: [EXACT],
    2: [AVERAGE | SHARED],
    3: [EXACT],
    5: [EXACT | SHARED, AVERAGE],
}


def drawn(group: Group, cases: list[dict[str, Any]], size: dict[str, int]) -> list[Tensor]:
    """On a rank: latents of each case; what is uninitialised is NaN."""
    torch.use_deterministic_algorithms(True)
    assert kernels.usable("cpu")
    pipe = make_tiny_pipeline()
    results = []
    for case in cases:
        parallelized = parallelize(pipe, group=group, **case)
        results.append(run(pipe, **size))
        parallelized.undo()
    return results


@cache
def expected(text_attention: str, ranks: int, pictures: int) -> Tensor:
    pipe = make_tiny_pipeline()
    parts = stripes_of(HEIGHT, ranks) if text_attention == "average" else None
    pipe.transformer.set_attn_processor(DenseClearProcessor(HEIGHT, WIDTH, RADIUS, parts))
    return run(pipe, **SIZE, num_images_per_prompt=pictures)


@pytest.mark.parametrize("ranks", ON_RANKS)
def test_windows_are_the_oracles(ranks: int) -> None:
    """On 5 ranks stripes are thinner than halos, which have several owners; on 2 there are two pictures."""
    cases, pictures = ON_RANKS[ranks], 1 + (ranks == 2)
    for results in run_ranks(drawn, ranks, cases, SIZE | {"num_images_per_prompt": pictures}):
        for latents, case in zip(results, cases, strict=True):
            assert relative_error(latents, expected(case["text_attention"], ranks, pictures)) < 1e-4


def test_late_halos_and_text_are_the_emulations() -> None:
    """Where a sum becomes the terms of the next in place; means of ranks have no kernel there."""
    case = EXACT | {"schedule": "stale", "warmup_steps": 1}
    for (latents,) in run_ranks(drawn, 2, [case], {"steps": test_stale.STEPS}):
        assert relative_error(latents, test_stale.emulated(RADIUS, "exact", 1, 2)) < 1e-4


def test_down_sampled_keys_are_the_oracles(tmp_path: Path) -> None:
    file = test_pooled_keys.checkpoint(tmp_path, 2)
    make_clear_weights(make_tiny_pipeline().transformer, file, down_factor=2)
    case = {"clear_weights": file, "text_attention": "exact", **KERNELS}
    for (latents,) in run_ranks(drawn, 2, [case], test_pooled_keys.SIZE):
        assert relative_error(latents, test_pooled_keys.oracle_latents(file)) < 1e-4
