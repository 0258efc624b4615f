"""Bytes that a plan names against those that the engine counts on ranks: of each kind of message, and of weights."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.lib import counts
from clear_dist.comm.group import Group
from clear_dist.families.flux.transformer import Flux
from clear_dist.parallelize import parallelize
from clear_dist.plan import GPUS, Engine, PlanRequest
from clear_dist.plan.traffic import step_traffic
from clear_dist.request.request import Request
from tests.comm import test_weight_shards
from tests.plan.asked import flux_request, tiny_request
from tests.plan.test_memory import SETTINGS, embeddings, requested
from tests.ranks import run_ranks
from tests.tiny import make_clear_weights, make_tiny_pipeline
from tests.weights import test_blocks

SIZE = {"height": 16 * 24, "width": 16 * 8, "window": 4}
COUNTED = {
    "halos_sent": "halo_bytes_sent",
    "pooled_sent": "pooled_bytes_sent",
    "text_gathered": "text_bytes_gathered",
    "text_reduced": "text_bytes_reduced",
    "weights_sent": "weight_bytes_sent",
    "join": "join_bytes",
}


def tiny() -> Any:
    pipe = make_tiny_pipeline(double_blocks=3, single_blocks=3)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def counted(group: Group, case: dict[str, Any], checkpoint: Path | None) -> dict[str, int]:
    """Bytes of the last of two or more steps, and of this rank's weights, those of hoisted modulation too."""
    pipe = tiny()
    modulation = sum(x.nbytes for norm in Flux(pipe.transformer).modulated.values() for x in norm.linear.parameters())
    request: Request = requested(pipe, group.size, case).request
    settings = {name: getattr(request, name) for name in SETTINGS}
    handle = parallelize(pipe, group=group, clear_weights=checkpoint, **settings)
    size = {"height": request.height, "width": request.width}
    steps = {"num_inference_steps": request.sampling.steps, "true_cfg_scale": request.sampling.true_cfg_scale}
    pipe(**embeddings(pipe, request), **size, **steps, output_type="latent", generator=torch.manual_seed(1))
    found = handle.counters.as_dict()
    weights = handle.weight_bytes + modulation * request.hoist_modulation
    return {name: int(found[word][-1]) for name, word in COUNTED.items()} | {"weights": weights}


LATE: dict[str, Any] = {"schedule": "stale", "steps": 4}
CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "text in shares": (3, {"text": 64}),
    "text in uneven shares": (3, {"text": 65, "flags": {"text_tokens": "sharded"}}),
    "text on all ranks": (3, {"text": 64, "flags": {"text_tokens": "replicated"}}),
    "text too short to share": (3, {"text": 4}),
    "down-sampled keys, two passes": (3, {"flags": {"down_factor": 4}, "guidance": 2.0, "images": 2}),
    "full attention": (2, {"window": "full"}),
    "down-sampled keys, stale": (2, {"flags": {"down_factor": 2}, "schedule": "stale", "steps": 4}),
    "weights in shards": (3, {"flags": {"shard_weights": True}, "guidance": 2.0, "images": 2}),
    "weights in shards of 8 bits": (2, {"flags": {"shard_weights": True, "int8": True}}),
    "weights in shards, modulation whole": (3, {"flags": {"shard_weights": True, "hoist_modulation": True}}),
    "8 bits": (2, {"flags": {"int8": True}}),
    "columns": (3, {"flags": {"cut": "columns"}}),
    "columns, down-sampled keys, stale": (2, {"width": 640, "flags": {"down_factor": 4}, **LATE}),
}


@pytest.mark.parametrize("name", CASES)
def test_bytes_are_those_that_the_engine_counts(name: str, engine: Engine, tmp_path: Path) -> None:
    ranks, case = CASES[name]
    asked = requested(tiny(), ranks, SIZE | case)
    factor = asked.request.down_factor
    checkpoint = None
    if factor > 1:
        checkpoint = tmp_path / f"clear_local_4_down_{factor}.safetensors"
        make_clear_weights(tiny().transformer, checkpoint, down_factor=factor)
    for rank, found in enumerate(run_ranks(counted, ranks, SIZE | case, checkpoint)):
        traffic = step_traffic(engine, asked, asked.stages[0], asked.parts[0][rank])
        for what in COUNTED:
            assert found[what] == getattr(traffic, what), f"rank {rank}, {what}"
        held = engine.weights(asked).held
        if asked.in_shards:  # planned: the largest share
            assert found["weights"] <= held < 1.1 * found["weights"]
        else:
            assert found["weights"] == held
        assert any(found[what] > 0 for what in COUNTED)


@pytest.mark.parametrize("ranks", [2, 3])
def test_blocks_that_are_gathered(ranks: int, engine: Engine) -> None:
    """The one at hand, and the buffer in which the next one arrives, where both are most."""
    pipe = make_tiny_pipeline(double_blocks=3, single_blocks=4)
    size = {"height": 256, "width": 256, "window": 4, "max_sequence_length": 64}
    asked = tiny_request(pipe, shard_weights=True, world_size=ranks, **size)
    planned = engine.step(asked, asked.stages[0], asked.parts[0][0]).peak["blocks gathered"]
    for rank in run_ranks(test_weight_shards.memory, ranks):
        most = max(here + under_way for _, here, under_way in rank["held"])
        assert planned == pytest.approx(most, rel=0.05)
        assert set(rank["sent"]) == {engine.weights(asked).sent}


@pytest.mark.parametrize(
    ("flags", "whole", "shares"),
    [
        ({}, 23.8, (12.0, 6.0, 3.1)),
        ({"hoist_modulation": True}, 17.3, (8.7, 4.4, 2.2)),
        ({"int8": True}, 15.2, (7.7, 3.9, 2.0)),
        ({"hoist_modulation": True, "int8": True}, 8.7, (4.4, 2.3, 1.2)),
    ],
)
def test_flux_in_shards(flags: dict[str, bool], whole: float, shares: tuple[float, ...], engine: Engine) -> None:
    """docs/models.md, "Smaller GPUs": counted on tensors, in GB."""
    assert engine.weights(flux_request(**flags)).held / 1e9 == pytest.approx(whole, abs=0.051)
    for ranks, share in zip((2, 4, 8), shares, strict=True):
        planned = engine.weights(flux_request(world_size=ranks, shard_weights=True, **flags))
        assert planned.held / 1e9 == pytest.approx(share, abs=0.051)


@pytest.mark.parametrize("flags", [{"int8": True}, {"float8": True, "hoist_modulation": True}])
def test_loading_on_a_gpu(flags: dict[str, bool], engine: Engine) -> None:
    """What comes to it while the blocks are made smaller, one layer at a time."""
    pipe = make_tiny_pipeline(double_blocks=4, single_blocks=16)
    asked = replace(tiny_request(pipe, **flags), gpu=GPUS["h100"]).changed(device="cuda")
    planned, allocated = engine.weights(asked), test_blocks.counted(pipe.transformer, **flags)
    assert planned.held == allocated.bytes
    assert allocated.peak <= planned.loading <= 1.03 * allocated.peak


def test_flux_in_shards_on_the_wire(engine: Engine) -> None:
    """docs/models.md: 20.7 GB arrive at each of 8 ranks in every pass, 13.2 with int8."""
    for int8, arriving in ((False, 20.7), (True, 13.2)):
        planned = engine.weights(flux_request(shard_weights=True, int8=int8))
        assert 7 * planned.sent / 1e9 == pytest.approx(arriving, abs=0.051)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"text_attention": "exact"},
        {"schedule": "stale", "text_attention": "exact"},
        {"text_tokens": "sharded"},
        {"window": "full", "text_attention": "exact"},
        {"window": 8, "down_factor": 4},
        {"world_size": 3},
    ],
)
def test_bytes_of_flux_are_those_of_the_formulas(settings: dict[str, Any], engine: Engine) -> None:
    """At 2048 px, on the rank in the middle; the formulas are the benchmarks'."""
    asked: PlanRequest = flux_request(height=2048, width=2048, cascade=False, **settings)
    request, rank = asked.request, asked.ranks // 2
    part = counts.Part(
        grid=(128, 128), ranks=asked.ranks, rank=rank, window=request.window or 16, factor=request.down_factor
    )
    how = request.schedule, request.text_attention or "average", request.text_tokens
    assert step_traffic(engine, asked, asked.stages[0], asked.parts[0][rank]) == counts.traffic(counts.FLUX, part, *how)


def test_columns_of_a_wide_picture_send_a_fifteenth(engine: Engine) -> None:
    """FLUX.1-dev at 16384 x 1024 px on 8 ranks, all halos of a step together; docs/figures.md."""
    sent = {}
    for cut in ("rows", "columns", "auto"):
        asked = flux_request(height=1024, width=16_384, cascade=False, cut=cut)
        stage, parts = asked.stages[0], asked.parts[0]
        sent[cut] = sum(step_traffic(engine, asked, stage, part).halos_sent for part in parts)
    assert sent["auto"] == sent["columns"] <= sent["rows"] / 12
    assert [round(sent[cut] / 1e9, 1) for cut in ("rows", "columns")] == [140.6, 9.4]
