"""Which attention backend `auto` takes for a stripe: as clear_dist/attention chooses, whose modules need torch."""

import json
from functools import lru_cache
from math import log2
from pathlib import Path
from typing import Any

from clear_dist.plan.request import Part, PlanRequest

TABLE = Path(__file__).parents[1] / "attention" / "measured.json"
FEW_TEXT_TOKENS = 64
MOST_MASK_BYTES = 2**27
"""Of a mask of `masked`."""
UNMEASURED = {"cpu": "tiled", "cuda": "flex"}
"""What is taken where nothing was measured on such devices."""
DENSE = ("masked", "reference")
"""Backends that compute every pair of a query and a key."""


def backend_of(request: PlanRequest, part: Part) -> str:
    """By the sizes that no call of any rank exceeds, so that all ranks choose alike."""
    if request.backend == "flex" and not request.on_cuda:
        return "reference"  # uncompiled it holds all scores, too
    if request.backend != "auto" or part.radius is None:
        return request.backend if request.backend != "auto" else UNMEASURED[_device(request)]
    return _chosen(
        _device(request),
        request.itemsize,
        part.tallest,
        min(part.height, part.tallest + 2 * (part.radius - 1)),
        part.columns,
        part.radius,
        request.text_tokens,
        request.model.head_dim,
    )


@lru_cache(maxsize=256)
def _chosen(
    device: str, itemsize: int, rows: int, key_rows: int, columns: int, radius: int, text: int, head_dim: int
) -> str:
    def distance(row: dict[str, Any]) -> float:
        pairs = (
            (row["rows"], rows),
            (row["columns"], columns),
            (row["radius"], radius),
            (row["text"] + FEW_TEXT_TOKENS, text + FEW_TEXT_TOKENS),
            (row["head_dim"], head_dim),
        )
        return sum(abs(log2(measured / asked)) for measured, asked in pairs)

    measured = [row for row in _table() if row["device_type"] == device]
    seconds: dict[str, float] = min(measured, key=distance)["seconds"] if measured else {}
    fits = rows * columns * (text + key_rows * columns) * itemsize <= MOST_MASK_BYTES
    able = (name for name in sorted(seconds, key=seconds.__getitem__) if name != "masked" or fits)
    return next(able, UNMEASURED[device])


@lru_cache(maxsize=1)
def _table() -> tuple[dict[str, Any], ...]:
    return tuple(json.loads(TABLE.read_text())["rows"])


def _device(request: PlanRequest) -> str:
    return "cuda" if request.on_cuda else "cpu"
