"""Backends by measured speed: `measured.json`, made by `benchmarks/speed/backends.py`.

A row has seconds of one call on several backends; only their order matters. `sources`: device and date of its file.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import log2
from pathlib import Path

from clear_dist.attention.backend import CallShape

TABLE = Path(__file__).with_name("measured.json")
FEW_TEXT_TOKENS = 64
"""Added to numbers of text tokens, so that none and a few are near each other."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A row of the table: a call whose keys are the queries' own rows and the text; seconds by backend."""

    device_type: str
    dtype: str
    rows: int
    columns: int
    radius: int
    text: int
    head_dim: int
    seconds: Mapping[str, float]
    source: str

    def __str__(self) -> str:
        sizes = f"{self.rows} x {self.columns} tokens, radius {self.radius}, {self.text} text tokens"
        times = ", ".join(f"{name} {1e3 * self.seconds[name]:.3g} ms" for name in self.fastest_first)
        return f"measured at {sizes}, heads of {self.head_dim}: {times} ({self.source})"

    @property
    def fastest_first(self) -> list[str]:
        return sorted(self.seconds, key=self.seconds.__getitem__)

    def distance(self, shape: CallShape) -> float:
        """Sum over all dimensions of the distance to `shape` in powers of two."""
        pairs = [
            (self.rows, shape.rows),
            (self.columns, shape.columns),
            (self.radius, shape.radius),
            (self.text + FEW_TEXT_TOKENS, shape.text + FEW_TEXT_TOKENS),
            (self.head_dim, shape.head_dim),
        ]
        return sum(abs(log2(mine / asked)) for mine, asked in pairs)


@lru_cache(maxsize=1)
def table() -> tuple[Measured, ...]:
    return tuple(Measured(**row) for row in json.loads(TABLE.read_text())["rows"])


def nearest(shape: CallShape) -> Measured | None:
    """Row of the nearest shape on this kind of device; None where there is none, or no shape is known yet."""
    if not (shape.rows and shape.columns and shape.radius and shape.head_dim):
        return None
    rows = [row for row in table() if row.device_type == shape.device_type]
    return min(rows, key=lambda row: row.distance(shape), default=None)
