"""The JSON report of a run (schema 1) and its measured figures."""

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from clear_dist import __version__
from clear_dist.observe.progress import LoadedPart, Times
from clear_dist.pictures import replacing

SCHEMA = 1
LIBRARIES = ("torch", "diffusers", "transformers")
STAGE_PHASES = ("encode", "denoise", "decode", "save")


@dataclass(frozen=True, kw_only=True)
class RankFigures:
    """Measurements of one rank."""

    peak_memory_bytes: int
    peak_since_loading: bool
    """False where the system cannot reset the high-water mark: then the peak includes loading."""
    weight_bytes: int
    """Bytes of the transformer on the rank's device."""
    stale_buffer_bytes: int
    """Most bytes kept from one step to the next in the stale schedule."""
    compile_seconds: float
    comm: Mapping[str, Sequence[float]]
    loading_peak_bytes: int = 0
    host_memory_bytes: int | None = None
    """Proportional set size after loading: pages of k ranks count 1/k in each. None: unknown."""


def versions() -> dict[str, str]:
    return {"clear-dist": __version__, "python": platform.python_version()} | {
        name: version(name) for name in LIBRARIES
    }


@dataclass(frozen=True, kw_only=True)
class StageFigures:
    image: Mapping[str, Any]
    """`Parallelized.last_image`, once it was drawn."""
    ranks: int
    """In use."""
    times: Times
    why: str | None = None
    """Why not all ranks drew it that could."""
    guidance_ranks: int = 1
    """2: each half of the ranks took a pass of guidance."""
    data_rank: int = 0
    """Number of the group that drew it."""


def build(
    *,
    seed: int,
    settings: Mapping[str, Any],
    times: Times,
    launch: float,
    total: float,
    stages: Sequence[StageFigures],
    ranks: Sequence[RankFigures],
    clear_weights: Mapping[str, Any] | None = None,
    parts: Sequence[LoadedPart] = (),
) -> dict[str, Any]:
    """The report as plain JSON values; `launch` and `total` are seconds until the ranks were at work, and overall."""
    listed = [_stage(stage) for stage in stages]
    return {
        "schema": SCHEMA,
        "versions": versions(),
        "seed": seed,
        "world_size": len(ranks),
        "settings": dict(settings),
        "clear_weights": None if clear_weights is None else dict(clear_weights),
        "grid": listed[-1]["grid"],
        "cut": listed[-1]["cut"],
        "stripes": listed[-1]["stripes"],
        "seconds": {"launch": launch, **times.seconds, "total": total},
        "seconds_per_step": times.seconds_per_step,
        "stages": listed,
        "peak_memory_bytes": [rank.peak_memory_bytes for rank in ranks],
        "peak_memory_includes_loading": not all(rank.peak_since_loading for rank in ranks),
        "weight_bytes": [rank.weight_bytes for rank in ranks],
        "stale_buffer_bytes": [rank.stale_buffer_bytes for rank in ranks],
        "loading": {
            "parts": [_part(part) for part in parts],
            "peak_memory_bytes": [rank.loading_peak_bytes for rank in ranks],
            "host_memory_bytes": [rank.host_memory_bytes for rank in ranks],
        },
        "compile_seconds": [rank.compile_seconds for rank in ranks],
        "comm": [{name: list(values) for name, values in rank.comm.items()} for rank in ranks],
    }


def _stage(stage: StageFigures) -> dict[str, Any]:
    return {
        **stage.image,
        "ranks": stage.ranks,
        "why_fewer_ranks": stage.why,
        "guidance_ranks": stage.guidance_ranks,
        "data_rank": stage.data_rank,
        "seconds": {name: stage.times.seconds[name] for name in STAGE_PHASES},
        "seconds_per_step": stage.times.seconds_per_step,
    }


def _part(part: LoadedPart) -> dict[str, Any]:
    """Gigabytes are 10^9 bytes."""
    rate = part.nbytes / 1e9 / part.seconds
    return {"name": part.name, "bytes": part.nbytes, "seconds": part.seconds, "gigabytes_per_second": rate}


def write(report: Mapping[str, Any], file: Path) -> None:
    with replacing(file) as partial:
        partial.write_text(json.dumps(report, indent=1) + "\n")
