"""A plan as plain values, for `--json`."""

from dataclasses import asdict
from typing import Any

from clear_dist.plan.asked import PlanRequest
from clear_dist.plan.fits import Change, Plan
from clear_dist.plan.phases import RankMemory
from clear_dist.plan.timing import assumptions

SCHEMA = 1
SAME = (
    "height", "width", "cascade", "window", "num_images", "dtype", "text_attention", "schedule", "warmup_steps",
    "down_factor", "hoist_modulation", "compile", "float8", "int8", "shard_weights", "offload", "keep_text_encoder",
    "stage_ranks", "cuda_graphs", "cut", "guidance_ranks", "data_ranks",
)  # fmt: skip
"""Names of a request's fields that readers know from the first plans on."""


def of_plan(plan: Plan, nearest: Change | None) -> dict[str, Any]:
    """Everything that is known of it; sizes in pixels and tokens, amounts in bytes, times in seconds."""
    asked = plan.asked
    return {
        "schema": SCHEMA,
        "request": of_request(asked),
        "stages": [list(stage.size) for stage in asked.stages],
        "ranks_of_stages": [len(parts) for parts in asked.parts],
        "cuts_of_stages": [asked.striping(stage).lines for stage in asked.stages],
        "stripes": [[rows.start, rows.stop] for rows in asked.striping(asked.stages[-1]).stripes],
        "memory": [_of_rank(memory) for memory in plan.ranks],
        "pinned_in_host_memory": plan.memory.pinned,
        "room": asdict(plan.room),
        "needed": plan.needed,
        "fits": plan.fits,
        "nearest": None if nearest is None else nearest.flags,
        "bytes_per_step": asdict(plan.traffic),
        "seconds": None
        if plan.seconds is None
        else {"stages": [asdict(time) for time in plan.times], "all": plan.seconds},
        "assumptions": list(assumptions(asked)),
    }


def of_request(asked: PlanRequest) -> dict[str, Any]:
    """Settings, models and hardware by name."""
    request = asked.request
    return {name: getattr(request, name) for name in SAME} | {
        "model": asked.model.name,
        "native": request.base_res or request.native_size,
        "sampling": asdict(request.sampling),
        "upscaling": asdict(request.upscaling),
        "picture": None if request.picture is None else list(request.picture.size),
        "ranks": asked.ranks,
        "gpu": None if asked.gpu is None else asked.gpu.name,
        "link": asked.link.name,
        "text_tokens": asked.text_tokens,
        "text_sharding": request.text_tokens,
        "backend": request.attention_backend,
        "lora_numbers": asked.lora_numbers,
        "forked": asked.forked,
    }


def of_sweep(plans: list[Plan]) -> dict[str, Any]:
    """What changes with the number of ranks."""
    return {
        "schema": SCHEMA,
        "request": of_request(plans[0].asked),
        "assumptions": list(assumptions(plans[0].asked)),
        "sweep": [
            {
                "ranks": plan.asked.ranks,
                "ranks_of_stages": [len(parts) for parts in plan.asked.parts],
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
