"""What a backend of windowed attention is: a name, a check and a function."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

MAX_SCORE_BYTES = 2**30
"""The most that a backend which holds every score at once may take for them."""


@dataclass(frozen=True)
class Request:
    """What is known of a call before it is made. The sizes may be left at 0 as long as they are not known."""

    device_type: str
    dtype: torch.dtype
    head_dim: int = 0
    heads: int = 1
    """Batch times heads."""
    rows: int = 0
    """Of queries."""
    key_rows: int = 0
    columns: int = 0
    text: int = 0
    """Text keys."""
    radius: int = 0

    @property
    def queries(self) -> int:
        return self.rows * self.columns

    @property
    def keys(self) -> int:
        return self.text + self.key_rows * self.columns


@dataclass(frozen=True, kw_only=True)
class WindowCall:
    """One call of windowed attention, checked and cut down to rows that matter: every query sees a key.

    There may be no text keys, or no image keys; not all queries need to see an image key where there is text.

    Shape suffixes: B batch, R rows of queries, E rows of keys, W columns, N heads, T text tokens, D head dim.
    """

    query: Tensor
    """[B, R, W, N, D]"""
    key: Tensor
    """[B, E, W, N, D], as `value`"""
    value: Tensor
    key_text: Tensor
    """[B, T, N, D], as `value_text`"""
    value_text: Tensor
    radius: int
    """In tokens: a key is seen if dx^2 + dy^2 < radius^2, strictly."""
    row_offset: int
    """Row i of the queries is row i + row_offset of the keys. May be negative."""
    scale: float


@dataclass(frozen=True)
class Backend:
    """One way of computing windowed attention: a row of BACKENDS."""

    name: str
    why_not: Callable[[Request], str | None]
    """The reason why it cannot answer a request, without its name; None if it can."""
    run: Callable[[WindowCall], tuple[Tensor, Tensor]]
    """Returns (out [B, R, W, N, D] in the dtype of the queries, lse [B, R, W, N] in float32)."""
    automatic_on: tuple[str, ...] = ()
    """The device types where `auto` may choose it unmeasured; elsewhere it runs when it was measured, or by name."""


def why_too_many_scores(request: Request) -> str | None:
    """The reason against a backend that holds every score in float32 at once; None if there is none."""
    taken = 4 * request.heads * request.queries * request.keys
    if taken <= MAX_SCORE_BYTES:
        return None
    return f"it holds all scores at once: {taken / 2**30:.1f} GiB, at most {MAX_SCORE_BYTES / 2**30:.0f}"
