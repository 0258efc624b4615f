"""A backend that writes to the output, and adds halos to what is there, in place: nothing else is left to merge."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from clear_dist.attention import BACKENDS
from clear_dist.attention.backend import WindowCall
from clear_dist.comm.group import Group
from clear_dist.engine.striped import require_striped
from clear_dist.parallelize import parallelize
from tests.engine import test_pooled_keys
from tests.ranks import run_ranks
from tests.test_parallelize import oracle_latents, relative_error, run
from tests.tiny import make_clear_weights, make_tiny_pipeline

STEPS, LAYERS = 3, 2


def extended(group: Group, size: dict[str, int], options: dict[str, Any]) -> tuple[Tensor, Counter[str]]:
    """Latents; how often attention was computed, and halos added to it."""
    calls: Counter[str] = Counter()

    def attend(call: WindowCall) -> tuple[Tensor, Tensor]:
        calls["run"] += 1
        out, lse = BACKENDS["reference"].run(call)
        assert call.out is not None, "an output's place is known"
        return call.out.copy_(out), lse

    def extend(call: WindowCall, lse: Tensor) -> None:
        calls["extend"] += 1
        assert call.out is not None, "what is there is known"
        further, further_lse = BACKENDS["reference"].run(replace(call, out=None))
        share = torch.stack([lse, further_lse]).double().softmax(0)[..., None]
        call.out.copy_((share * torch.stack([call.out, further]).double()).sum(0))
        lse.copy_(torch.logaddexp(lse, further_lse))

    pipe = make_tiny_pipeline()
    parallelize(pipe, group=group, text_attention="exact", **options)
    striped = require_striped(pipe)
    backend = replace(BACKENDS["reference"], run=attend, extend=extend)
    striped.settings = replace(striped.settings, choose_backend=lambda **sizes: backend)
    return run(pipe, steps=STEPS, **size), calls


@pytest.mark.parametrize("size", [1, 2, 5])
def test_halos_are_added_to_what_is_there(size: int) -> None:
    for rank, (latents, calls) in enumerate(run_ranks(extended, size, {}, {"window": 4})):
        assert relative_error(latents, oracle_latents(4, None)) < 1e-4
        sides = (rank > 0) + (rank < size - 1)
        assert calls == Counter(run=STEPS * LAYERS) + Counter(extend=STEPS * LAYERS * sides)


def test_pooled_keys_are_merged_with_them(tmp_path: Path) -> None:
    file = test_pooled_keys.checkpoint(tmp_path, 4)
    make_clear_weights(make_tiny_pipeline().transformer, file, down_factor=4)
    for latents, _ in run_ranks(extended, 2, test_pooled_keys.SIZE, {"clear_weights": file}):
        assert relative_error(latents, test_pooled_keys.oracle_latents(file)) < 1e-4
