"""Bytes that a plan names against those that the engine counts on ranks: of each kind of message, and of weights."""

from pathlib import Path
from typing import Any

import pytest
import torch

from clear_dist.comm.group import Group
from clear_dist.parallelize import parallelize
from clear_dist.plan import PlanRequest
from clear_dist.plan.traffic import step_traffic
from clear_dist.plan.weights import weights_per_rank
from tests.comm import test_weight_shards
from tests.plan.sizes import FLUX, sizes_of
from tests.plan.test_memory import embeddings, requested
from tests.ranks import run_ranks
from tests.tiny import make_clear_weights, make_tiny_pipeline

SIZE = {"height": 16 * 24, "width": 16 * 8, "window": 4}
COUNTED = {
    "halos_sent": "halo_bytes_sent",
    "pooled_sent": "pooled_bytes_sent",
    "text_gathered": "text_bytes_gathered",
    "text_reduced": "text_bytes_reduced",
    "weights_sent": "weight_bytes_sent",
    "join": "join_bytes",
}


def run(group: Group, case: dict[str, Any], checkpoint: Path | None) -> tuple[PlanRequest, Any]:
    """A generation of two steps."""
    pipe = make_tiny_pipeline(double_blocks=2, single_blocks=2)
    pipe.set_progress_bar_config(disable=True)
    request, flags = requested(pipe, group.size, case), case.get("flags", {})
    settings = {name: getattr(request, name) for name in ("window", "text_attention", "schedule", "warmup_steps")}
    settings |= {name: flags[name] for name in ("int8", "shard_weights") if name in flags}
    handle = parallelize(pipe, group=group, text_tokens=request.text_sharding, clear_weights=checkpoint, **settings)
    size = {"height": request.height, "width": request.width}
    steps = {"num_inference_steps": request.sampling.steps, "true_cfg_scale": request.sampling.true_cfg_scale}
    pipe(**embeddings(pipe, request), **size, **steps, output_type="latent", generator=torch.manual_seed(1))
    return request, handle


def counted_and_planned(group: Group, case: dict[str, Any], checkpoint: Path | None) -> dict[str, tuple[int, int]]:
    request, handle = run(group, case, checkpoint)
    stage, part = request.stages[0], request.parts[0][group.rank]
    planned, counted = step_traffic(request, stage, group.rank, part), handle.counters.as_dict()
    found = {name: (counted[word][-1], getattr(planned, name)) for name, word in COUNTED.items()}
    return found | {"weights": (handle.weight_bytes, request.weights.held)}


CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "text in shares": (3, {"text": 64}),
    "text in uneven shares": (3, {"text": 65, "flags": {"text_sharding": "sharded"}}),
    "text on all ranks": (3, {"text": 64, "flags": {"text_sharding": "replicated"}}),
    "text too short to share": (3, {"text": 4}),
    "down-sampled keys, two passes": (3, {"flags": {"down_factor": 4}, "guidance": 2.0, "images": 2}),
    "full attention": (2, {"window": "full"}),
    "down-sampled keys, stale": (2, {"flags": {"down_factor": 2}, "schedule": "stale", "steps": 4}),
    "weights in shards": (3, {"flags": {"shard_weights": True}, "guidance": 2.0, "images": 2}),
    "weights in shards of 8 bits": (2, {"flags": {"shard_weights": True, "int8": True}}),
    "8 bits": (2, {"flags": {"int8": True}}),
}


@pytest.mark.parametrize("name", CASES)
def test_bytes_are_those_that_the_engine_counts(name: str, tmp_path: Path) -> None:
    ranks, case = CASES[name]
    factor = case.get("flags", {}).get("down_factor", 1)
    checkpoint = None
    if factor > 1:
        checkpoint = tmp_path / f"clear_local_4_down_{factor}.safetensors"
        transformer = make_tiny_pipeline(double_blocks=2, single_blocks=2).transformer
        make_clear_weights(transformer, checkpoint, down_factor=factor)
    for rank, found in enumerate(run_ranks(counted_and_planned, ranks, SIZE | case, checkpoint)):
        for what, (counted, planned) in found.items():
            if what == "weights" and case.get("flags", {}).get("shard_weights"):  # planned: the largest share
                assert counted <= planned < 1.1 * counted, f"rank {rank}"
            else:
                assert counted == planned, f"rank {rank}, {what}"
    assert any(counted > 0 for counted, _ in found.values())


@pytest.mark.parametrize("ranks", [2, 3])
def test_blocks_that_are_gathered(ranks: int) -> None:
    """The one at hand, and the buffer in which the next one arrives, where both are most."""
    pipe = make_tiny_pipeline(double_blocks=3, single_blocks=4)
    planned = weights_per_rank(sizes_of(pipe), itemsize=4, ranks=ranks, sharded=True)
    for rank in run_ranks(test_weight_shards.memory, ranks):
        assert max(here + under_way for _, here, under_way in rank["held"]) == pytest.approx(planned.gathered, rel=0.05)
        assert set(rank["sent"]) == {planned.sent}


@pytest.mark.parametrize(
    ("flags", "whole", "shares", "with_blocks"),
    [
        ({}, 23.8, (12.0, 6.0, 3.1), (13.3, 7.4, 4.4)),
        ({"hoisted": True}, 17.3, (8.7, 4.4, 2.2), (9.6, 5.3, 3.1)),
        ({"eight_bits": True}, 15.2, (7.7, 3.9, 2.0), (8.6, 4.8, 2.9)),
        ({"hoisted": True, "eight_bits": True}, 8.7, (4.4, 2.3, 1.2), (4.9, 2.7, 1.6)),
    ],
)
def test_flux_in_shards(
    flags: dict[str, bool], whole: float, shares: tuple[float, ...], with_blocks: tuple[float, ...]
) -> None:
    """docs/models.md, "Smaller GPUs": counted on tensors, in GB."""
    assert weights_per_rank(FLUX, itemsize=2, **flags).held / 1e9 == pytest.approx(whole, abs=0.051)
    for ranks, share, together in zip((2, 4, 8), shares, with_blocks, strict=True):
        planned = weights_per_rank(FLUX, itemsize=2, ranks=ranks, sharded=True, **flags)
        assert planned.held / 1e9 == pytest.approx(share, abs=0.051)
        assert (planned.held + planned.gathered) / 1e9 == pytest.approx(together, abs=0.051)


def test_flux_in_shards_on_the_wire() -> None:
    """docs/models.md: 20.7 GB arrive at each of 8 ranks in every pass, 13.2 with int8."""
    for eight_bits, arriving in ((False, 20.7), (True, 13.2)):
        planned = weights_per_rank(FLUX, itemsize=2, ranks=8, sharded=True, eight_bits=eight_bits)
        assert 7 * planned.sent / 1e9 == pytest.approx(arriving, abs=0.051)
