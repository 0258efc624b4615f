"""Plans as a whole: what more ranks change, what the nearest settings promise, and what programs read."""

import json
from dataclasses import replace
from typing import Any

import pytest

from clear_dist.plan import GPUS, Engine, Plan, PlanRequest, Room, nearest, record
from clear_dist.plan.fits import groups
from clear_dist.plan.phases import Memory
from tests.plan.asked import flux_request

WHOLE, TEXT, VAE = 2 * 11_901_408_320, 2 * 4_885_371_136, 2 * 83_819_683
"""Bytes of FLUX.1-dev's transformer, text encoders and VAE in bfloat16."""
STALE = {"height": 2048, "width": 2048, "schedule": "stale", "world_size": 4}


def plan_of(asked: PlanRequest, engine: Engine, room: float = 80e9) -> Plan:
    return Plan(asked=asked, room=Room(bytes=round(room), where="here"), engine=engine)


REQUESTS: tuple[dict[str, Any], ...] = (
    {"height": 2048, "width": 1024, "world_size": 3},
    {"height": 1040, "width": 2048, "world_size": 5, "window": 32, "shard_weights": True},
    {"height": 1024, "width": 1024, "world_size": 2, "window": "full", "text_attention": "exact"},
    {"height": 1024, "width": 1024, "world_size": 4, "int8": True, "keep_text_encoder": True, "num_images": 2},
    {"height": 1536, "width": 1536, "world_size": 7, "schedule": "stale", "hoist_modulation": True},
)


@pytest.mark.parametrize("settings", REQUESTS)
def test_the_highest_peak_is_that_of_all_ranks_and_stages(settings: dict[str, Any], engine: Engine) -> None:
    """It is found without asking about parts and stages that others cover, but for a token of text."""
    plan = plan_of(flux_request(**settings), engine)
    assert plan.needed == pytest.approx(max(memory.peak for memory in plan.ranks), rel=1e-4)


@pytest.mark.parametrize("settings", REQUESTS)
def test_stripes_of_more_ranks_take_no_more(settings: dict[str, Any], engine: Engine) -> None:
    """But for NCCL, and for halos and what is sent of a rank that has neighbours on both sides now."""
    few = flux_request(**settings | {"schedule": "sync", "cascade": False, "world_size": 2})
    many = few.changed(world_size=8)
    before, after = (plan_of(asked, engine) for asked in (few, many))
    step = engine.step(many, many.stages[0], many.parts[0][4])
    exchanged = step.peak.get("halos", 0) + step.peak.get("halos on their way", 0)
    assert after.needed <= before.needed + exchanged


@pytest.mark.parametrize(
    ("settings", "room"), [(REQUESTS[0], 5e9), (REQUESTS[0], 20e9), (REQUESTS[3], 24e9), (STALE, 26e9)]
)
def test_the_nearest_settings_fit(settings: dict[str, Any], room: float, engine: Engine) -> None:
    asked = flux_request(**settings)
    change = nearest(plan_of(asked, engine, room))
    if change is None:
        everything = (change for group in groups(asked, 64) for change in group[-1:])
        assert not any(plan_of(each.of(asked), engine, room).fits for each in everything)
        return
    changed = plan_of(change.of(asked), engine, room)
    assert changed.fits and changed.needed <= room
    for name, value in change.fields.items():
        assert getattr(changed.asked.request, name) == value


SAVINGS: tuple[dict[str, Any], ...] = (
    {"hoist_modulation": True},
    {"schedule": "sync"},
    {"keep_text_encoder": False},
    {"shard_weights": True},
    {"offload": True},
)


@pytest.mark.parametrize("settings", [REQUESTS[0], REQUESTS[3], STALE])
def test_savings_save(settings: dict[str, Any], engine: Engine) -> None:
    asked = flux_request(**settings)
    peak = plan_of(asked, engine).needed
    for saving in SAVINGS:
        assert plan_of(asked.changed(**saving), engine).needed <= peak, saving


def test_text_encoders_that_are_freed_make_room_for_the_transformer(engine: Engine) -> None:
    """They are loaded, used, and gone before it comes: the larger of both counts, not their sum."""
    asked = flux_request(height=1024, width=1024, world_size=2)
    kept, freed = (plan_of(asked.changed(keep_text_encoder=keep), engine) for keep in (True, False))
    assert kept.ranks[1].peak == freed.ranks[1].peak
    assert kept.ranks[0].peak - freed.ranks[0].peak == pytest.approx(TEXT, rel=0.01)
    tiny = asked.changed(hoist_modulation=True, int8=True, shard_weights=True, world_size=8)
    assert plan_of(tiny, engine).ranks[0].largest.name == "text"


def test_what_flux_needs_at_8192_pixels(engine: Engine) -> None:
    """Weights 23.8 GB; the VAE's largest maps 4.3 and 2.1 GB on 8 ranks; halos of all layers by the stale schedule."""
    phases = items_of(flux_request(), engine, 3)
    assert phases["decode"]["transformer"] == WHOLE
    assert phases["decode"]["VAE activations"] / 1e9 == pytest.approx(6.6, abs=0.1)
    assert "text encoders" not in phases["decode"]
    stale = items_of(flux_request(schedule="stale"), engine, 3)["denoise"]
    assert stale["stale halos"] / 1e9 == pytest.approx(10.8, abs=0.05)
    assert stale["halos on their way"] / 1e9 == pytest.approx(1.7, abs=0.05)


def items_of(asked: PlanRequest, engine: Engine, rank: int = 0) -> dict[str, Any]:
    """Items of the phases before all stages and in the last one, by the phase's name."""
    memory = Memory(asked=asked, engine=engine)
    phases = (*memory.before(rank), *memory.of_stage(rank, len(asked.stages) - 1))
    return {phase.name: phase.items for phase in phases}


def test_what_is_made_smaller_is_loaded_piece_by_piece(engine: Engine) -> None:
    """On one rank a layer at a time beside what is kept; shards take less to load than a step gathers."""
    both = {"float8": True, "hoist_modulation": True}
    for flags, most in (({"int8": True}, 0.66), ({"hoist_modulation": True}, 0.74), (both, 0.39)):
        small = flux_request(height=1024, width=1024, world_size=1, **flags)
        items = items_of(small, engine)
        denoising = items["denoise"]["transformer"]
        assert denoising <= items.get("load", items["denoise"])["transformer"] < denoising + 0.3e9 < most * WHOLE
        in_shards = small.changed(world_size=2, shard_weights=True)
        assert "load" not in items_of(in_shards, engine) and plan_of(in_shards, engine).needed < 16e9


def test_what_is_offloaded_is_there_while_it_is_used(engine: Engine) -> None:
    asked = flux_request(height=2048, width=2048, world_size=2, keep_text_encoder=True, offload=True)
    first, second = (items_of(asked, engine, rank) for rank in range(2))
    assert first["text"]["text encoders"] == TEXT and "VAE" not in first["text"]
    for items in (first, second):
        assert items["encode"]["VAE"] == items["decode"]["VAE"] == VAE
        assert not {"VAE", "text encoders"} & (items["denoise"].keys() | items["save"].keys())
    stays = items_of(asked.changed(offload=False), engine)
    assert stays["denoise"]["VAE"] == VAE and stays["denoise"]["text encoders"] == TEXT


def test_what_changes_the_picture_is_tried_last() -> None:
    """More ranks, then what saves memory for the same picture, then 8 bits, then smaller pictures."""
    asked = flux_request(world_size=2, gpu=GPUS["rtx4090"], keep_text_encoder=True, schedule="stale")
    flags = [change.flags for group in groups(asked, 64) for change in group]
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
    assert flux_request(world_size=64, shard_weights=True).is_possible
    assert not flux_request(world_size=65, shard_weights=True).is_possible
    assert flux_request(world_size=65).is_possible


def test_down_sampled_keys_at_8192_pixels(engine: Engine) -> None:
    """docs/models.md: 176 MB a layer and rank of 8, and nine tenths of the operations of the matrix products."""
    plain, pooled = (flux_request(window=8, down_factor=factor) for factor in (1, 4))
    sent = plan_of(pooled, engine).traffic
    assert sent.pooled_sent / 57 == pytest.approx(176e6, rel=0.005)
    assert sent.pooled_sent == sent.pooled_received
    before, after = (engine.step(each, each.stages[-1], each.parts[-1][3]).operations for each in (plain, pooled))
    more = after["attention"] - before["attention"]
    assert more / before["products"] == pytest.approx(0.89, abs=0.02)
    full = pooled.changed(window="full", text_attention="exact")
    assert "pooled_bytes_sent" not in engine.step(full, full.stages[-1], full.parts[-1][3]).bytes


def test_a_plan_for_programs(engine: Engine) -> None:
    plan = plan_of(flux_request(), engine)
    found: dict[str, Any] = json.loads(json.dumps(record.of_plan(plan, None)))
    assert found["stripes"] == [[64 * rank, 64 * (rank + 1)] for rank in range(8)]
    assert [max(phase["total"] for phase in rank["phases"]) for rank in found["memory"]] == [
        rank["peak"] for rank in found["memory"]
    ]
    assert found["request"]["model"] == "black-forest-labs/FLUX.1-dev" and found["request"]["gpu"] == "H100"
    assert (found["request"]["cuda_graphs"], found["request"]["stage_ranks"]) == ("auto", "auto")
    assert found["fits"] is True and found["needed"] == max(rank["peak"] for rank in found["memory"])
    assert sum(stage["steps"] for stage in found["seconds"]["stages"]) == 28 + 3 * 20


def test_a_sweep_is_made_of_single_plans(engine: Engine) -> None:
    asked = flux_request(height=2048, width=2048)
    plans = [plan_of(asked.changed(world_size=each), engine) for each in (1, 3, 8)]
    swept = json.loads(json.dumps(record.of_sweep(plans)))["sweep"]
    for row, plan in zip(swept, plans, strict=True):
        alone = json.loads(json.dumps(record.of_plan(replace(plan), None)))
        assert row["seconds"] == alone["seconds"]["all"]
        same = ("needed", "fits", "bytes_per_step", "ranks_of_stages")
        assert {name: row[name] for name in same} == {name: alone[name] for name in same}
