"""Random inputs for windowed attention. Suffixes: B batch, R rows, W columns, N heads, D head dim."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from clear_dist.attention import BACKENDS, window_attention


@dataclass(frozen=True)
class Case:
    """The sizes of one call, in tokens."""

    rows: int
    key_rows: int
    columns: int
    text: int
    radius: int
    row_offset: int = 0
    batch: int = 1
    heads: int = 2
    head_dim: int = 16
    dtype: torch.dtype = torch.float32
    scale: float | None = None
    square: bool = False
    seed: int = field(default=0, repr=False)

    def tensors(self) -> tuple[Tensor, ...]:
        """Query, key, value, text key, text value. The image tensors are views into larger ones, as in use."""
        generator = torch.Generator().manual_seed(self.seed)
        tail = (self.columns, self.heads, self.head_dim)

        def image(rows: int) -> Tensor:
            return torch.randn(self.batch, rows + 2, *tail, generator=generator).to(self.dtype)[:, 1:-1]

        def text() -> Tensor:
            return torch.randn(self.batch, self.text, *tail[1:], generator=generator).to(self.dtype)

        return image(self.rows), image(self.key_rows), image(self.key_rows), text(), text()

    def run(self, name: str, tensors: tuple[Tensor, ...], **changed: Any) -> tuple[Tensor, Tensor]:
        """The output of the backend called `name` and its log-sum-exp."""
        options = {
            "radius": self.radius,
            "row_offset": self.row_offset,
            "scale": self.scale,
            "square": self.square,
        } | changed
        return window_attention(*tensors, **options, backend=BACKENDS[name])
