"""What `clear_dist.merge` computes, and text tokens to their place, in one launch each.

On the meta device nothing happens, nor is anything allocated. Tensors may have any strides but along D, which is
contiguous.

Shapes: B batch, R rows, W columns, N heads, D head dim; [B, L, N, D] is one row. P parts.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from clear_dist.kernels import power_of_two

ITEMS = 16
"""Queries and heads of one program."""
WARPS = 4
BLOCK = 1024
"""Numbers that one program copies at once."""
Part = tuple[Tensor, Tensor, int]
"""Output, log-sum-exp in float32, and which row of the whole is their first."""


def merge(parts: Sequence[Part], merged: Tensor, lse: Tensor | None = None) -> None:
    """Merge parts [B, r, W, N, D], each of some of the rows of `merged` [B, R, W, N, D], by their [B, r, W, N].

    Where the first part is `merged` itself, only rows that others share are read and written.
    """
    outs, lses = [_rows(out) for out, _, _ in parts], [_rows(lse, last="N") for _, lse, _ in parts]
    firsts = tuple(first for _, _, first in parts)
    stops = tuple(first + out.shape[1] for first, out in zip(firsts, outs, strict=True))
    whole, whole_lse = _rows(merged), None if lse is None else _rows(lse, last="N")
    _compute(
        "merge_kernel",
        [tuple(outs), tuple(lses)],
        [whole, whole_lse],
        *(firsts, stops),
        PARTS=len(parts),
        WITH_LSE=lse is not None,
        IN_PLACE=parts[0][0] is merged,
    )


def merge_stacked(outs_PBLND: Tensor, lses_PBLN: Tensor | None, merged_BLND: Tensor) -> None:
    """Merge parts that lie in one tensor; without log-sum-exps, their mean."""
    first_lse = None if lses_PBLN is None else _rows(lses_PBLN[0], last="N")
    _compute(
        "merge_stacked_kernel",
        [_rows(outs_PBLND[0]), first_lse],
        [_rows(merged_BLND)],
        *(outs_PBLND.stride(0), 0 if lses_PBLN is None else lses_PBLN.stride(0), len(outs_PBLND)),
        WEIGHED=lses_PBLN is not None,
    )


def weigh(out_BLND: Tensor, lse_BLN: Tensor, maximum_BLN: Tensor, weighed_BLND1: Tensor) -> None:
    lses = _rows(lse_BLN, last="N"), _rows(maximum_BLN, last="N")
    _compute("weigh_kernel", [_rows(out_BLND), *lses], [_rows(weighed_BLND1)], head_dim=out_BLND.shape[-1])


def unweigh(summed_BLND1: Tensor, out_BLND: Tensor) -> None:
    _compute("unweigh_kernel", [_rows(summed_BLND1)], [_rows(out_BLND)])


def relay(
    summed_BLND1: Tensor, reference_BLN: Tensor, out_BLND: Tensor, lse_BLN: Tensor, before_BLND: Tensor, most: float
) -> None:
    """Turn a sum of terms into `before_BLND`, and itself and its reference into the terms of the next, in place."""
    read = [_rows(out_BLND), _rows(lse_BLN, last="N")]
    written = [_rows(summed_BLND1), _rows(reference_BLN, last="N"), _rows(before_BLND)]
    _compute("relay_kernel", read, written, most, head_dim=out_BLND.shape[-1])


def pack(
    out_BLND: Tensor, lse_BLN: Tensor | None, packed_BLND: Tensor, packed_BLN: Tensor | None, *, first: int, to: int
) -> None:
    """Copy, with the tokens from `first` on moved to `to`, before others."""
    lses = [None if x is None else _rows(x, last="N") for x in (packed_BLN, lse_BLN)]
    packed, out = [_rows(packed_BLND), lses[0]], [_rows(out_BLND), lses[1]]
    _compute("pack_kernel", out, packed, first, to, WITH_LSE=lse_BLN is not None)


def spread(arrived_PSKBND: Tensor, counts: Sequence[int], own: int, tensors_BLND: Sequence[Tensor]) -> None:
    """Copy tokens of all ranks but `own`, in order, to the first of K tensors of equal strides, [N, D] contiguous.

    `counts` are as in `TextPlan`: the first ranks may have one token more than the others.
    """
    share, first = min(counts), tensors_BLND[0]
    larger = sum(count > share for count in counts)
    assert tuple(counts) == (share + 1,) * larger + (share,) * (len(counts) - larger), f"shares of {counts}"
    assert all(x.stride() == first.stride() for x in tensors_BLND), "tensors of different strides"
    elsewhere = sum(counts) - counts[own]
    if first.is_meta or not elsewhere:
        return
    numbers = {"padded": arrived_PSKBND.shape[1], "share": share, "larger": larger}
    _launch(
        "spread_kernel",
        [arrived_PSKBND],
        [tuple(tensors_BLND)],
        (elsewhere, len(first)),
        *first.stride()[:2],
        **numbers,
        before=sum(counts[:own]),
        own=counts[own],
        SIZE=first.shape[2] * first.shape[3],
        TENSORS=len(tensors_BLND),
        BLOCK=BLOCK,
    )


def _rows(x: Tensor, last: str = "D") -> Tensor:
    return x.unsqueeze(1) if x.ndim < 4 + (last == "D") else x


def _compute(
    kernel: str, read: list[Any], written: list[Any], *numbers: Any, head_dim: int | None = None, **constants: Any
) -> None:
    """Launch a kernel on the items of the first tensor that it writes, [B, R, W, N, D] as all are, or [B, R, W, N]."""
    batch, rows, columns, heads, dim = written[0].shape
    dim = dim if head_dim is None else head_dim
    items = batch * rows * columns * heads
    assert items < 2**31, f"{items} queries and heads are beyond int32"
    if written[0].is_meta or not items:
        return
    sizes = {"items": items, "rows": rows, "columns": columns, "heads": heads}
    dims = {"HEAD_DIM": dim, "DIMS": power_of_two(dim)}
    strides = map(_strides, [*written, *read])
    _launch(kernel, read, written, (-(-items // ITEMS),), *strides, *numbers, **sizes, **dims, ITEMS=ITEMS, **constants)


def _launch(
    kernel: str, read: list[Any], written: list[Any], grid: tuple[int, ...], *numbers: Any, **named: Any
) -> None:
    """Launch a kernel; its arguments begin with the tensors, or tuples of them, that it writes, then those it reads."""
    from clear_dist.kernels import merging_kernels

    with torch.cuda.device_of(written[0][0]):
        getattr(merging_kernels, kernel)[grid](*written, *read, *numbers, num_warps=WARPS, **named)


def _strides(x: Any) -> Any:
    """Strides of a tensor, of each of a tuple of them, or of none."""
    if isinstance(x, tuple):
        return tuple(map(_strides, x))
    return (0, 0, 0, 0) if x is None else x.stride()[:4]
