"""Weights in shards: the same numbers as whole ones, from a share of the memory, on stripes and in a cascade."""

from typing import Any

import pytest
import torch
from torch import Tensor

from clear_dist.comm.group import Group
from clear_dist.parallelize import parallelize
from tests.ranks import run_ranks
from tests.test_parallelize import oracle_latents, relative_error, run
from tests.tiny import make_tiny_pipeline

EXACT: dict[str, Any] = {"window": 4, "text_attention": "exact"}
BLOCKS: dict[str, Any] = {"double_blocks": 2, "single_blocks": 2}


def bytes_of(tensors: Any) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def sharded_and_whole(group: Group, settings: list[dict[str, Any]], inference: bool) -> list[tuple[Tensor, Tensor]]:
    results = []
    with torch.inference_mode(inference):
        for arguments in settings:
            latents = []
            for shard_weights in (True, False):
                pipe = make_tiny_pipeline(**BLOCKS)
                handle = parallelize(pipe, group=group, shard_weights=shard_weights, **arguments)
                latents.append(run(pipe))
                handle.undo()
            results.append((latents[0], latents[1]))
    return results


@pytest.mark.parametrize(("size", "inference"), [(1, False), (2, True), (3, False)])
def test_shards_are_whole_weights(size: int, inference: bool) -> None:
    """The same products of the same numbers: nothing may differ, not by a rounding."""
    stale = EXACT | {"schedule": "stale", "warmup_steps": 1}
    settings = [EXACT, EXACT | {"hoist_modulation": True}, stale, {"window": "full"}]
    for results in run_ranks(sharded_and_whole, size, settings, inference):
        for sharded, whole in results:
            assert torch.equal(sharded, whole)


def sharded_latents(group: Group) -> Tensor:
    pipe = make_tiny_pipeline()
    parallelize(pipe, group=group, shard_weights=True, **EXACT)
    return run(pipe)


@pytest.mark.parametrize("size", [2, 3, 5])
def test_any_number_of_ranks_computes_what_one_does(size: int) -> None:
    """Rows of weights that 3 and 5 ranks do not divide."""
    for latents in run_ranks(sharded_latents, size):
        assert relative_error(latents, oracle_latents(4, None)) < 1e-4
