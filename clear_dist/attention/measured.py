"""Which backend was the fastest where it was measured: `measured.json`, made by `benchmarks/speed/backends.py`.

Its rows are seconds of one call on each of several backends that took turns; `sources` tells device and date of the
result file that a row was taken from. Only their order within a row matters.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import log2
from pathlib import Path

from clear_dist.attention.backend import Request

TABLE = Path(__file__).with_name("measured.json")
FEW_TEXT_TOKENS = 64
"""Added to the number of text tokens, so that none and a few are near to each other."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A row of the table: one shape of call, whose keys are the queries' own rows and the text."""

    device_type: str
    dtype: str
    rows: int
    columns: int
    radius: int
    text: int
    head_dim: int
    seconds: Mapping[str, float]
    """By backend."""
    source: str

    def __str__(self) -> str:
        sizes = f"{self.rows} x {self.columns} tokens, radius {self.radius}, {self.text} text tokens"
        times = ", ".join(f"{name} {1e3 * self.seconds[name]:.3g} ms" for name in self.fastest_first)
        return f"measured at {sizes}, heads of {self.head_dim}: {times} ({self.source})"

    @property
    def fastest_first(self) -> list[str]:
        return sorted(self.seconds, key=self.seconds.__getitem__)

    def distance(self, request: Request) -> float:
        """How far its shape is from what is asked for, in powers of two, all dimensions added."""
        pairs = [
            (self.rows, request.rows),
            (self.columns, request.columns),
            (self.radius, request.radius),
            (self.text + FEW_TEXT_TOKENS, request.text + FEW_TEXT_TOKENS),
            (self.head_dim, request.head_dim),
        ]
        return sum(abs(log2(mine / asked)) for mine, asked in pairs)


@lru_cache(maxsize=1)
def table() -> tuple[Measured, ...]:
    """All rows, in the order of the file."""
    return tuple(Measured(**row) for row in json.loads(TABLE.read_text())["rows"])


def nearest(request: Request) -> Measured | None:
    """The row for this kind of device whose shape is nearest; None where there is none, or no shape is known yet."""
    if not (request.rows and request.columns and request.radius and request.head_dim):
        return None
    rows = [row for row in table() if row.device_type == request.device_type]
    return min(rows, key=lambda row: row.distance(request), default=None)
