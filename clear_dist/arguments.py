"""The arguments of `parallelize`, checked: each function raises ValueError with the rule, the value and the nearest."""

from collections.abc import Callable
from functools import partial
from operator import index
from pathlib import Path
from typing import Any

import torch

from clear_dist.attention import Backend, choose_backend
from clear_dist.clear_checkpoint import refuse_other_radius
from clear_dist.config import Schedule, TextAttention, TextTokens, rules
from clear_dist.config.rules import SCHEDULES
from clear_dist.models.float8 import why_not as why_not_float8
from clear_dist.models.weights import radius_of
from clear_dist.preflight.devices import missing_compiler, missing_quantiser


def checked_windows(
    window: int | str | None, controlnet_window: int | str | None, clear_weights: str | Path | None
) -> tuple[int | None, int | None]:
    """The radius of the transformer and that of its ControlNets."""
    radius = checked_radius(window, clear_weights)
    return radius, radius if controlnet_window is None else checked_radius(controlnet_window, None)


def checked_radius(window: int | str | None, clear_weights: str | Path | None) -> int | None:
    if window is None:
        return radius_of(clear_weights) if clear_weights is not None else None
    if window == "full":
        return None
    if isinstance(window, bool | str) or not hasattr(window, "__index__") or window < 1:
        raise ValueError(f"window must be a radius of at least 1 token or 'full', got {window!r}; nearest: 1")
    if clear_weights is not None:
        refuse_other_radius(clear_weights, index(window))
    return index(window)


def checked_backend(name: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> Callable[..., Backend]:
    """`choose_backend` with all but sizes given; raises ValueError where there is no such backend for any image."""
    choose = partial(choose_backend, name, device=device, dtype=dtype, head_dim=head_dim)
    choose()
    return choose


def checked_schedule(schedule: Schedule, warmup_steps: int) -> dict[str, Any]:
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule must be 'sync' or 'stale', got {schedule!r}")
    if isinstance(warmup_steps, bool) or not hasattr(warmup_steps, "__index__") or warmup_steps < 0:
        raise ValueError(f"warmup_steps must be a whole number of at least 0, got {warmup_steps!r}; nearest: 0")
    return {"schedule": schedule, "warmup_steps": index(warmup_steps)}


def checked_weights(
    *,
    float8: bool,
    int8: bool,
    shard_weights: bool,
    hoist_modulation: bool,
    compile: bool,
    device: torch.device,
    dtype: torch.dtype,
) -> dict[str, Any]:
    """What is done to the weights, and to what lies between their products."""
    if float8 and (needed := why_not_float8(device, dtype)):
        raise ValueError(f"float8 needs {needed}; nearest: float8=False")
    if int8 and float8:
        raise ValueError("float8 and int8 exclude each other, got both; nearest: float8=False")
    if int8 and (missing := missing_quantiser()):
        raise ValueError(f"int8 needs {missing}, got none; nearest: int8=False")
    if compile and (missing := missing_compiler(device.type)):
        raise ValueError(f"compile needs {missing}, got none; nearest: compile=False")
    given = {"float8": float8, "int8": int8, "shard_weights": shard_weights}
    return given | {"hoist_modulation": hoist_modulation, "compile": compile}


def checked_text(
    text_attention: TextAttention | None, text_tokens: TextTokens, radius: int | None, schedule: Schedule
) -> dict[str, Any]:
    if text_attention not in (None, "average", "exact"):
        raise ValueError(f"text_attention must be 'average' or 'exact', got {text_attention!r}")
    if radius is None and text_attention == "average":
        raise ValueError("text_attention must be 'exact' where window is 'full', got 'average'; nearest: 'exact'")
    rules.check_choice("text_tokens", text_tokens, rules.TEXT_TOKENS)
    rules.check_text_tokens("text_tokens", text_tokens, schedule)
    default: TextAttention = "average" if radius is not None else "exact"
    return {"text_attention": text_attention or default, "text_tokens": text_tokens}
