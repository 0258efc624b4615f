"""Plans as a whole: what more ranks change, what the nearest settings promise, and what programs read."""

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clear_dist.plan import GPUS, Plan, PlanRequest, Room, changes, nearest, record
from clear_dist.plan.counts import linear_work, pooled_pairs
from clear_dist.plan.memory import rank_memory
from clear_dist.plan.traffic import counted, share_of
from clear_dist.stages import Sampling
from tests.plan.sizes import flux_request

UNIT = 16
"""Pixels of a row of tokens."""


def plan_of(request: PlanRequest, room: float = 80e9) -> Plan:
    return Plan(request=request, room=Room(bytes=round(room), where="here"))


requests = st.builds(
    flux_request,
    height=st.integers(4, 512).map(lambda rows: 16 * rows),
    width=st.integers(4, 512).map(lambda columns: 16 * columns),
    ranks=st.integers(1, 4),
    window=st.sampled_from([1, 4, 8, 16, 32, "full"]),
    num_images=st.integers(1, 2),
    schedule=st.sampled_from(["sync", "stale"]),
    backend=st.sampled_from(["flex", "triton", "tiled"]),
    hoist_modulation=st.booleans(),
    float8=st.booleans(),
    compile=st.booleans(),
    shard_weights=st.booleans(),
    offload=st.booleans(),
    keep_text_encoder=st.booleans(),
    text_sharding=st.sampled_from(["auto", "replicated"]),
    gpu=st.sampled_from([GPUS["h100"], GPUS["rtx4090"]]),
    sampling=st.sampled_from([Sampling(), Sampling(true_cfg_scale=2.0)]),
)


@given(request=requests, more=st.integers(2, 4))
@settings(deadline=None, max_examples=60)
def test_stripes_of_more_ranks_take_no_more(request: PlanRequest, more: int) -> None:
    """In the sync schedule, but for one unit of rows, and for halos of a rank that has neighbours on both sides now.

    What is the same on all ranks stays: weights, the picture's keys and values in the VAE.
    """
    request = replace(request, schedule="sync", cascade=False, ranks=min(request.ranks, request.height // UNIT))
    many = replace(request, ranks=min(request.ranks * more, request.height // UNIT))
    before, after = (plan_of(each).largest.peak for each in (request, many))
    part = max(many.parts[0], key=lambda part: part.received + part.sent)
    row = 2 * request.num_images * part.columns * 3072 * 2
    exchanged = row * (part.received + part.gathered + part.sent) + 12 * row * part.received
    one_row = 200 * row
    nccl = 400_000_000
    assert after <= before + exchanged + one_row + nccl


@given(request=requests, room=st.floats(10e9, 120e9))
@settings(deadline=None, max_examples=25)
def test_the_nearest_settings_fit(request: PlanRequest, room: float) -> None:
    request = replace(request, ranks=min(request.ranks, request.height // UNIT))
    plan = plan_of(request, room)
    change = nearest(plan)
    if change is None:
        assert not any(plan_of(each.of(request), room).fits for each in changes(request, 64))
        return
    changed = plan_of(change.of(request), room)
    assert changed.fits
    assert all(rank_memory(changed.request, rank).peak <= room for rank in range(changed.request.ranks))
    for name, value in change.fields.items():
        assert getattr(changed.request, name) == value


@given(request=requests)
@settings(deadline=None, max_examples=30)
def test_ranks_that_are_computed_once_are_as_those_computed_one_by_one(request: PlanRequest) -> None:
    request = replace(request, ranks=min(7, request.height // UNIT))
    plan = plan_of(request)
    assert plan.ranks == tuple(rank_memory(request, rank) for rank in range(request.ranks))


SAVINGS: tuple[dict[str, Any], ...] = (
    {"hoist_modulation": True},
    {"schedule": "sync"},
    {"keep_text_encoder": False},
    {"shard_weights": True},
    {"offload": True},
)


@given(request=requests)
@settings(deadline=None, max_examples=30)
def test_savings_save(request: PlanRequest) -> None:
    request = replace(
        request,
        ranks=min(request.ranks, request.height // UNIT),
        hoist_modulation=False,
        shard_weights=False,
        offload=False,
    )
    peak = plan_of(request).largest.peak
    for saving in SAVINGS:
        assert plan_of(replace(request, **saving)).largest.peak <= peak, saving


def test_text_encoders_that_are_freed_make_room_for_the_transformer() -> None:
    """They are loaded, used, and gone before it comes: the larger of both counts, not their sum."""
    request = flux_request(height=1024, width=1024, ranks=2)
    kept, freed = (plan_of(replace(request, keep_text_encoder=keep)) for keep in (True, False))
    assert kept.ranks[1].peak == freed.ranks[1].peak
    assert kept.ranks[0].peak - freed.ranks[0].peak == pytest.approx(2 * 4_885_371_136, rel=0.01)
    tiny = replace(freed.request, hoist_modulation=True, float8=True, shard_weights=True, ranks=8)
    assert plan_of(tiny).ranks[0].largest.name == "text"


def test_what_flux_needs_at_8192_pixels() -> None:
    """Weights 23.8 GB; the VAE's largest maps 4.3 and 2.1 GB on 8 ranks; on one GPU about 103 GB in one piece."""
    memory = plan_of(flux_request()).ranks[3]
    decode = next(phase for phase in memory.phases if (phase.name, phase.stage) == ("decode", 3))
    assert decode.items["transformer"] / 1e9 == pytest.approx(23.8, abs=0.05)
    assert decode.items["VAE activations"] / 1e9 == pytest.approx(6.6, abs=0.1)
    assert "text encoders" not in decode.items
    stale = plan_of(flux_request(schedule="stale")).ranks[3]
    denoise = next(phase for phase in stale.phases if (phase.name, phase.stage) == ("denoise", 3))
    assert denoise.items["stale halos"] / 1e9 == pytest.approx(10.8, abs=0.05)
    assert denoise.items["halos on their way"] / 1e9 == pytest.approx(1.7, abs=0.05)


def items_of(request: PlanRequest, rank: int) -> dict[str, Any]:
    """Items of the phases before and in the only stage, by the phase's name."""
    return {phase.name: phase.items for phase in rank_memory(request, rank).phases}


def test_what_is_made_smaller_on_one_gpu_is_loaded_whole() -> None:
    """But for shards, which come from host memory block by block."""
    for flags in ({"int8": True}, {"hoist_modulation": True}, {"float8": True, "hoist_modulation": True}):
        small = flux_request(height=1024, width=1024, ranks=1, **flags)
        assert items_of(small, 0)["load"]["transformer"] == 2 * 11_901_408_320
        assert plan_of(small).needed > 2 * 11_901_408_320 > items_of(small, 0)["denoise"]["transformer"]
        in_shards = replace(small, ranks=2, shard_weights=True)
        assert "load" not in items_of(in_shards, 0) and plan_of(in_shards).needed < 16e9


def test_what_is_offloaded_is_there_while_it_is_used() -> None:
    vae, encoders = 2 * 83_819_683, 2 * 4_885_371_136
    request = flux_request(height=2048, width=2048, ranks=2, keep_text_encoder=True, offload=True)
    first, second = items_of(request, 0), items_of(request, 1)
    assert first["text"]["text encoders"] == encoders and "VAE" not in first["text"]
    for items in (first, second):
        assert items["encode"]["VAE"] == items["decode"]["VAE"] == vae
        assert not {"VAE", "text encoders"} & (items["denoise"].keys() | items["save"].keys())
    stays = items_of(replace(request, offload=False), 0)
    assert stays["denoise"]["VAE"] == vae and stays["denoise"]["text encoders"] == encoders
    on_cpu = items_of(replace(request, gpu=None), 0)
    assert on_cpu["denoise"]["VAE"] == vae, "no effect there"


def test_what_changes_the_picture_is_tried_last() -> None:
    """More ranks, then what saves memory for the same picture, then 8 bits, then smaller pictures."""
    request = flux_request(ranks=2, gpu=GPUS["rtx4090"], keep_text_encoder=True, schedule="stale")
    flags = [change.flags for change in changes(request, 64)]
    assert flags[:5] == [f"--nproc {ranks}" for ranks in (4, 8, 16, 32, 64)]
    alone = ["--schedule sync", "without --keep-text-encoder", "--hoist-modulation", "--shard-weights", "--offload"]
    assert flags[5:10] == alone
    bits = [any(word in each for word in ("int8", "float8")) for each in flags]
    smaller = ["--res" in each for each in flags]
    assert bits.index(True) > max(index for index, each in enumerate(flags) if alone[4] in each and not bits[index])
    assert flags[bits.index(True)] == "--int8"
    assert smaller.index(True) > max(index for index, each in enumerate(bits) if each and not smaller[index])


def test_shards_need_rows_for_all_ranks_in_every_stage() -> None:
    """The first one has 64."""
    assert plan_of(flux_request(ranks=64, shard_weights=True)).fits
    assert not plan_of(flux_request(ranks=65, shard_weights=True)).fits
    assert plan_of(flux_request(ranks=65)).fits


def test_down_sampled_keys_at_8192_pixels() -> None:
    """docs/models.md: 176 MB a layer and rank of 8, and nine tenths of the operations of the matrix products."""
    request = flux_request(window=8, down_factor=4)
    sent = plan_of(request).traffic
    assert sent.pooled_sent / 57 == pytest.approx(176e6, rel=0.005)
    assert sent.pooled_sent == sent.pooled_received
    stage, part = request.stages[-1], request.parts[-1][3]
    share, model = share_of(request, stage, 3, part), counted(request)
    pooled = 4 * model.channels * model.layers * pooled_pairs(share)
    assert pooled / linear_work(model, share) == pytest.approx(0.89, abs=0.02)
    with_window = flux_request(window="full", down_factor=4).parts[-1][3]
    assert with_window.pooled_tokens == with_window.pooled_sent == 0


def test_a_plan_for_programs() -> None:
    plan = plan_of(flux_request())
    found: dict[str, Any] = json.loads(json.dumps(record.of_plan(plan, None)))
    assert found["stripes"] == [[64 * rank, 64 * (rank + 1)] for rank in range(8)]
    assert [max(phase["total"] for phase in rank["phases"]) for rank in found["memory"]] == [
        rank["peak"] for rank in found["memory"]
    ]
    assert found["request"]["model"] == "FLUX.1-dev" and found["request"]["gpu"] == "H100"
    assert found["fits"] is True and found["needed"] == max(rank["peak"] for rank in found["memory"])
    assert sum(stage["steps"] for stage in found["seconds"]["stages"]) == 28 + 3 * 20


@pytest.mark.parametrize("ranks", [1, 3, 8])
def test_a_sweep_is_made_of_single_plans(ranks: int) -> None:
    plans = [plan_of(flux_request(ranks=each)) for each in (1, 3, 8)]
    swept = next(row for row in record.of_sweep(plans)["sweep"] if row["ranks"] == ranks)
    alone = record.of_plan(plan_of(flux_request(ranks=ranks)), None)
    assert swept["needed"] == alone["needed"] and swept["fits"] == alone["fits"]
    assert swept["seconds"] == alone["seconds"]["all"]
    assert swept["bytes_per_step"] == alone["bytes_per_step"]
