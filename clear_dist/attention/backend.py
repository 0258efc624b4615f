"""Windowed attention as its backends see it: one call, its shape, and a backend's check and function."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from clear_dist.kernels import AMPERE

MAX_SCORE_BYTES = 2**30


@dataclass(frozen=True)
class CallShape:
    """A call before it is made: batch times heads, rows of queries and keys, text keys; 0 means not known yet."""

    device_type: str
    dtype: torch.dtype
    head_dim: int = 0
    heads: int = 1
    rows: int = 0
    key_rows: int = 0
    columns: int = 0
    text: int = 0
    radius: int = 0
    square: bool = False

    @property
    def queries(self) -> int:
        return self.rows * self.columns

    @property
    def keys(self) -> int:
        return self.text + self.key_rows * self.columns


@dataclass(frozen=True)
class Geometry:
    """Everything that a mask depends on, in tokens."""

    rows: int
    key_rows: int
    columns: int
    text: int
    radius: int
    row_offset: int
    square: bool = False


@dataclass(frozen=True, kw_only=True)
class WindowCall:
    """One checked call of windowed attention, cut down to rows that matter: every query sees a key.

    Queries are [B, R, W, N, D], keys and values [B, E, W, N, D], those of the text [B, T, N, D]; E or T may be 0. A key
    is seen if dx^2 + dy^2 < radius^2 in tokens, strictly; row i of the queries is row i + row_offset of the keys. With
    `square` it is seen if both squares are less.

    Shape suffixes: B batch, R rows of queries, E rows of keys, W columns, N heads, T text tokens, D head dim.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    key_text: Tensor
    value_text: Tensor
    radius: int
    row_offset: int
    scale: float
    square: bool = False
    out: Tensor | None = None
    """Where a backend that can writes its output, [B, R, W, N, D] of any strides; others leave it alone."""

    @property
    def shape(self) -> CallShape:
        batch, rows, columns, heads, head_dim = self.query.shape
        kind = self.query.device.type, self.query.dtype, head_dim, batch * heads
        return CallShape(*kind, rows, self.key.shape[1], columns, self.key_text.shape[1], self.radius, self.square)

    @property
    def geometry(self) -> Geometry:
        rows, columns = self.query.shape[1:3]
        key_rows, text = self.key.shape[1], self.key_text.shape[1]
        return Geometry(rows, key_rows, columns, text, self.radius, self.row_offset, self.square)

    @property
    def sees_itself(self) -> bool:
        """Whether keys are those of the queries, so that each query sees an image key."""
        return self.query.shape == self.key.shape and self.row_offset == 0


def squared_distance(down: Tensor, across: Tensor, square: bool) -> Tensor:
    """Squared distance of keys from queries, from the squares along both axes: their sum, in a square the larger."""
    return torch.maximum(down, across) if square else down + across


def capability() -> int:
    """Major compute capability of this process's GPU; 0 where there is none."""
    return torch.cuda.get_device_capability()[0] if torch.cuda.is_available() else 0


def is_before_ampere(device_type: str) -> bool:
    """Whether it is a GPU that lacks bfloat16, and that FlashAttention and Triton do not know."""
    return device_type == "cuda" and 0 < capability() < AMPERE


def nothing(shape: CallShape) -> None:
    """No reason."""


@dataclass(frozen=True)
class Backend:
    name: str
    why_not: Callable[[CallShape], str | None]
    """Reason why it cannot compute a call anywhere, without its name; None if it can."""
    run: Callable[[WindowCall], tuple[Tensor, Tensor]]
    """(out [B, R, W, N, D] in the dtype of the queries, lse [B, R, W, N] in float32)

    On the meta device it allocates what it would elsewhere, and computes nothing.
    """
    automatic_on: tuple[str, ...] = ()
    """Device types where `auto` may choose it unmeasured."""
    lacks: Callable[[CallShape], str | None] = nothing
    """What this machine lacks for it; None: nothing."""
    extend: Callable[[WindowCall, Tensor], None] | None = None
    """Adds the call's keys to attention over others, in place: the call's `out`, and lse [B, R, W, N] in float32.

    An lse of -inf means no key yet, whatever the output. None: the backend cannot, its results are to be merged.
    """

    def why_not_here(self, shape: CallShape) -> str | None:
        return self.lacks(shape) or self.why_not(shape)


def why_too_many_scores(shape: CallShape) -> str | None:
    """Reason against holding every score in float32 at once; None if there is none."""
    taken = 4 * shape.heads * shape.queries * shape.keys
    if taken <= MAX_SCORE_BYTES:
        return None
    return f"it holds all scores at once: {taken / 2**30:.1f} GiB, at most {MAX_SCORE_BYTES / 2**30:.0f}"
