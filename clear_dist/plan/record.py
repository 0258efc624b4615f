"""A plan as plain values, for `--json`."""

from dataclasses import asdict
from typing import Any

from clear_dist.geometry import cut_in_stripes
from clear_dist.plan.fits import Change, Plan
from clear_dist.plan.memory import RankMemory, pinned_bytes
from clear_dist.plan.request import PlanRequest
from clear_dist.plan.timing import assumptions

SCHEMA = 1
NAMED = ("model", "gpu", "link")


def of_plan(plan: Plan, nearest: Change | None) -> dict[str, Any]:
    """Everything that is known of it; sizes in pixels and tokens, amounts in bytes, times in seconds."""
    request = plan.request
    stripes = cut_in_stripes(request.height // request.model.token, request.ranks, unit=request.down_factor)
    return {
        "schema": SCHEMA,
        "request": of_request(request),
        "stages": [list(stage.size) for stage in request.stages],
        "stripes": [[rows.start, rows.stop] for rows in stripes],
        "memory": [_of_rank(memory) for memory in plan.ranks],
        "pinned_in_host_memory": pinned_bytes(request),
        "room": asdict(plan.room),
        "needed": plan.needed,
        "fits": plan.fits,
        "nearest": None if nearest is None else nearest.flags,
        "bytes_per_step": asdict(plan.traffic),
        "seconds": None
        if plan.seconds is None
        else {"stages": [asdict(time) for time in plan.times], "all": plan.seconds},
        "assumptions": list(assumptions(request)),
    }


def of_request(request: PlanRequest) -> dict[str, Any]:
    """Its settings, models and hardware by name."""
    values = {name: value for name, value in vars(request).items() if name in request.__dataclass_fields__}
    names = {name: None if values[name] is None else values[name].name for name in NAMED}
    own = {name: asdict(values[name]) for name in ("sampling", "upscaling")}
    return values | names | own


def of_sweep(plans: list[Plan]) -> dict[str, Any]:
    """What changes with the number of ranks."""
    return {
        "schema": SCHEMA,
        "request": of_request(plans[0].request),
        "assumptions": list(assumptions(plans[0].request)),
        "sweep": [
            {
                "ranks": plan.request.ranks,
                "needed": plan.needed,
                "room": plan.room.bytes,
                "fits": plan.fits,
                "bytes_per_step": asdict(plan.traffic),
                "seconds": plan.seconds,
            }
            for plan in plans
        ],
    }


def _of_rank(memory: RankMemory) -> dict[str, Any]:
    return {
        "rank": memory.rank,
        "peak": memory.peak,
        "phases": [asdict(phase) | {"total": phase.total} for phase in memory.phases],
    }
