"""Merging attention by log-sum-exp, as `merging.py` calls it: one program for some queries and heads ("items").

Shape suffixes: I items, D head dim (rounded up to a power of two), X some of a token's numbers. Strides are those of
[B, R, W, N, D]; offsets are int64.
"""

import triton
import triton.language as tl

SIZES = ("items", "rows", "columns", "heads")
"""Numbers whose values no kernel is compiled for."""


@triton.jit
def place(items, rows, columns, heads, ITEMS: tl.constexpr):
    """(batch, row, column, head, whether there is such an item) of a program's items."""
    item_I = tl.program_id(0) * ITEMS + tl.arange(0, ITEMS)  # int32, in which division is much cheaper
    query_I = item_I // heads
    return query_I // columns // rows, query_I // columns % rows, query_I % columns, item_I % heads, item_I < items


@triton.jit
def at(pointer, strides, batch_I, row_I, column_I, head_I):
    image_I = batch_I.to(tl.int64) * strides[0] + row_I.to(tl.int64) * strides[1]
    return pointer + (image_I + column_I.to(tl.int64) * strides[2] + head_I.to(tl.int64) * strides[3])


@triton.jit
def share(lse_I, maximum_I):
    """Weight of a part whose log-sum-exp is `lse_I`; 0 where it has no key, also where none has."""
    return tl.exp(lse_I - tl.where(maximum_I == -float("inf"), 0.0, maximum_I))


@triton.jit
def quotient(sum_ID, weight_I):
    return sum_ID / tl.where(weight_I == 0, 1.0, weight_I)[:, None]


@triton.jit
def part_lse(lse, strides, first, stop, batch_I, row_I, column_I, head_I, inside_I):
    here_I = inside_I & (row_I >= first) & (row_I < stop)
    return tl.load(at(lse, strides, batch_I, row_I - first, column_I, head_I), mask=here_I, other=-float("inf"))


@triton.jit(do_not_specialize=SIZES)
def merge_kernel(
    merged, lse, outs, lses, merged_strides, lse_strides, outs_strides, lses_strides, firsts, stops,
    items, rows, columns, heads, HEAD_DIM: tl.constexpr, PARTS: tl.constexpr, ITEMS: tl.constexpr, DIMS: tl.constexpr,
    WITH_LSE: tl.constexpr, IN_PLACE: tl.constexpr,
):  # fmt: skip
    """Merge PARTS parts, each of the rows from `firsts` up to `stops` of `merged`, of which `rows` is the number.

    IN_PLACE: the first part is in `merged`, and rows of no other are left alone.
    """
    batch_I, row_I, column_I, head_I, inside_I = place(items, rows, columns, heads, ITEMS)
    if IN_PLACE:
        is_shared_I = row_I < 0
        for part in tl.static_range(1, PARTS):
            is_shared_I |= (row_I >= firsts[part]) & (row_I < stops[part])
        inside_I &= is_shared_I
    dim_D = tl.arange(0, DIMS)
    maximum_I = tl.full([ITEMS], -float("inf"), tl.float32)
    for part in tl.static_range(PARTS):
        lse_I = part_lse(
            lses[part], lses_strides[part], firsts[part], stops[part], batch_I, row_I, column_I, head_I, inside_I
        )  # fmt: skip
        maximum_I = tl.maximum(maximum_I, lse_I)
    sum_ID, weight_I = tl.zeros([ITEMS, DIMS], tl.float32), tl.zeros([ITEMS], tl.float32)
    for part in tl.static_range(PARTS):
        lse_I = part_lse(
            lses[part], lses_strides[part], firsts[part], stops[part], batch_I, row_I, column_I, head_I, inside_I
        )  # fmt: skip
        out_I = at(outs[part], outs_strides[part], batch_I, row_I - firsts[part], column_I, head_I)
        # What a part without keys holds is not even read.
        seen_ID = (lse_I > -float("inf"))[:, None] & (dim_D < HEAD_DIM)
        part_I = share(lse_I, maximum_I)
        sum_ID += tl.load(out_I[:, None] + dim_D, mask=seen_ID, other=0.0).to(tl.float32) * part_I[:, None]
        weight_I += part_I
    merged_I = at(merged, merged_strides, batch_I, row_I, column_I, head_I)
    merged_ID = quotient(sum_ID, weight_I).to(merged.dtype.element_ty)
    tl.store(merged_I[:, None] + dim_D, merged_ID, mask=inside_I[:, None] & (dim_D < HEAD_DIM))
    if WITH_LSE:
        lse_I = at(lse, lse_strides, batch_I, row_I, column_I, head_I)
        tl.store(lse_I, maximum_I + tl.log(tl.where(weight_I == 0, 1.0, weight_I)), mask=inside_I)


@triton.jit(do_not_specialize=SIZES)
def merge_stacked_kernel(
    merged, outs, lses, merged_strides, outs_strides, lses_strides, outs_stride, lses_stride, parts,
    items, rows, columns, heads, HEAD_DIM: tl.constexpr, ITEMS: tl.constexpr, DIMS: tl.constexpr,
    WEIGHED: tl.constexpr,
):  # fmt: skip
    """Merge parts that lie `outs_stride` and `lses_stride` one after another; unless WEIGHED, their mean."""
    batch_I, row_I, column_I, head_I, inside_I = place(items, rows, columns, heads, ITEMS)
    dim_D = tl.arange(0, DIMS)
    out_ID = at(outs, outs_strides, batch_I, row_I, column_I, head_I)[:, None] + dim_D
    maximum_I = tl.full([ITEMS], -float("inf"), tl.float32)
    if WEIGHED:
        lse_I = at(lses, lses_strides, batch_I, row_I, column_I, head_I)
        for part in range(parts):
            part_I = tl.load(lse_I + part * lses_stride, mask=inside_I, other=-float("inf"))
            maximum_I = tl.maximum(maximum_I, part_I)
    sum_ID, weight_I = tl.zeros([ITEMS, DIMS], tl.float32), tl.zeros([ITEMS], tl.float32)
    for part in range(parts):
        part_I = inside_I.to(tl.float32)
        if WEIGHED:
            part_I = share(tl.load(lse_I + part * lses_stride, mask=inside_I, other=-float("inf")), maximum_I)
        seen_ID = (part_I > 0)[:, None] & (dim_D < HEAD_DIM)
        sum_ID += tl.load(out_ID + part * outs_stride, mask=seen_ID, other=0.0).to(tl.float32) * part_I[:, None]
        weight_I += part_I
    merged_I = at(merged, merged_strides, batch_I, row_I, column_I, head_I)
    merged_ID = quotient(sum_ID, weight_I).to(merged.dtype.element_ty)
    tl.store(merged_I[:, None] + dim_D, merged_ID, mask=inside_I[:, None] & (dim_D < HEAD_DIM))


@triton.jit(do_not_specialize=SIZES)
def weigh_kernel(
    weighed, out, lse, maximum, weighed_strides, out_strides, lse_strides, maximum_strides,
    items, rows, columns, heads, HEAD_DIM: tl.constexpr, ITEMS: tl.constexpr, DIMS: tl.constexpr,
):  # fmt: skip
    batch_I, row_I, column_I, head_I, inside_I = place(items, rows, columns, heads, ITEMS)
    dim_D = tl.arange(0, DIMS)
    lse_I = tl.load(at(lse, lse_strides, batch_I, row_I, column_I, head_I), mask=inside_I, other=-float("inf"))
    maximum_I = tl.load(at(maximum, maximum_strides, batch_I, row_I, column_I, head_I), mask=inside_I, other=0.0)
    weight_I = share(lse_I, maximum_I)
    seen_ID = (lse_I > -float("inf"))[:, None] & (dim_D < HEAD_DIM)
    out_I = at(out, out_strides, batch_I, row_I, column_I, head_I)
    out_ID = tl.load(out_I[:, None] + dim_D, mask=seen_ID, other=0.0).to(tl.float32) * weight_I[:, None]
    weighed_I = at(weighed, weighed_strides, batch_I, row_I, column_I, head_I)
    tl.store(weighed_I[:, None] + dim_D, out_ID, mask=inside_I[:, None] & (dim_D < HEAD_DIM))
    tl.store(weighed_I + HEAD_DIM, weight_I, mask=inside_I)


@triton.jit(do_not_specialize=SIZES)
def unweigh_kernel(
    out, summed, out_strides, summed_strides,
    items, rows, columns, heads, HEAD_DIM: tl.constexpr, ITEMS: tl.constexpr, DIMS: tl.constexpr,
):  # fmt: skip
    batch_I, row_I, column_I, head_I, inside_I = place(items, rows, columns, heads, ITEMS)
    dim_D = tl.arange(0, DIMS)
    inside_ID = inside_I[:, None] & (dim_D < HEAD_DIM)
    summed_I = at(summed, summed_strides, batch_I, row_I, column_I, head_I)
    weight_I = tl.load(summed_I + HEAD_DIM, mask=inside_I, other=1.0)
    out_ID = quotient(tl.load(summed_I[:, None] + dim_D, mask=inside_ID, other=0.0), weight_I)
    out_I = at(out, out_strides, batch_I, row_I, column_I, head_I)
    tl.store(out_I[:, None] + dim_D, out_ID.to(out.dtype.element_ty), mask=inside_ID)


@triton.jit(do_not_specialize=SIZES)
def relay_kernel(
    summed, reference, before, out, lse,
    summed_strides, reference_strides, before_strides, out_strides, lse_strides, most,
    items, rows, columns, heads, HEAD_DIM: tl.constexpr, ITEMS: tl.constexpr, DIMS: tl.constexpr,
):  # fmt: skip
    """Each program has read what it overwrites."""
    batch_I, row_I, column_I, head_I, inside_I = place(items, rows, columns, heads, ITEMS)
    dim_D = tl.arange(0, DIMS)
    inside_ID = inside_I[:, None] & (dim_D < HEAD_DIM)
    summed_I = at(summed, summed_strides, batch_I, row_I, column_I, head_I)
    reference_I = at(reference, reference_strides, batch_I, row_I, column_I, head_I)
    before_I = at(before, before_strides, batch_I, row_I, column_I, head_I)
    sum_I = tl.load(summed_I + HEAD_DIM, mask=inside_I, other=1.0)
    before_ID = quotient(tl.load(summed_I[:, None] + dim_D, mask=inside_ID, other=0.0), sum_I)
    tl.store(before_I[:, None] + dim_D, before_ID.to(before.dtype.element_ty), mask=inside_ID)
    known_I = tl.load(reference_I, mask=inside_I, other=0.0) + tl.log(sum_I)
    lse_I = tl.load(at(lse, lse_strides, batch_I, row_I, column_I, head_I), mask=inside_I, other=-float("inf"))
    weight_I = share(tl.minimum(tl.maximum(lse_I, known_I - most), known_I + most), known_I)
    out_I = at(out, out_strides, batch_I, row_I, column_I, head_I)
    seen_ID = inside_ID & (weight_I > 0)[:, None]
    out_ID = tl.load(out_I[:, None] + dim_D, mask=seen_ID, other=0.0).to(tl.float32) * weight_I[:, None]
    tl.debug_barrier()
    tl.store(reference_I, known_I, mask=inside_I)
    tl.store(summed_I[:, None] + dim_D, out_ID, mask=inside_ID)
    tl.store(summed_I + HEAD_DIM, weight_I, mask=inside_I)


@triton.jit(do_not_specialize=SIZES)
def pack_kernel(
    packed, packed_lse, out, lse, packed_strides, packed_lse_strides, out_strides, lse_strides, first, to,
    items, rows, columns, heads, HEAD_DIM: tl.constexpr, ITEMS: tl.constexpr, DIMS: tl.constexpr,
    WITH_LSE: tl.constexpr,
):  # fmt: skip
    """Copy, with the tokens (columns) from `first` on moved to `to`, before others."""
    batch_I, row_I, column_I, head_I, inside_I = place(items, rows, columns, heads, ITEMS)
    dim_D = tl.arange(0, DIMS)
    inside_ID = inside_I[:, None] & (dim_D < HEAD_DIM)
    moved_I = tl.where(column_I < first, column_I + columns - first, column_I - first + to)
    to_I = tl.where(column_I < to, column_I, moved_I)
    out_I = at(out, out_strides, batch_I, row_I, column_I, head_I)
    packed_I = at(packed, packed_strides, batch_I, row_I, to_I, head_I)
    tl.store(packed_I[:, None] + dim_D, tl.load(out_I[:, None] + dim_D, mask=inside_ID), mask=inside_ID)
    if WITH_LSE:
        lse_I = tl.load(at(lse, lse_strides, batch_I, row_I, column_I, head_I), mask=inside_I)
        tl.store(at(packed_lse, packed_lse_strides, batch_I, row_I, to_I, head_I), lse_I, mask=inside_I)


@triton.jit(do_not_specialize=("share", "larger", "before", "own"))
def spread_kernel(
    spread, arrived, batch_stride, token_stride, padded, share, larger, before, own,
    SIZE: tl.constexpr, TENSORS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program for a token and a picture: SIZE numbers of each tensor of `arrived`, [rank, token, tensor, picture].

    Of each rank there are `padded` tokens: of `larger` ranks share + 1 are filled in, of the rest `share`.
    """
    to, batch, batches = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), tl.num_programs(1)
    token = tl.where(to < before, to, to + own)
    beyond = token - larger * (share + 1)
    is_larger = beyond < 0
    rank = tl.where(is_larger, token // (share + 1), larger + beyond // tl.maximum(share, 1))
    token = tl.where(is_larger, token % (share + 1), beyond % tl.maximum(share, 1))
    number_X = tl.arange(0, BLOCK)
    for tensor in tl.static_range(TENSORS):
        source = arrived + (((rank * padded + token) * TENSORS + tensor) * batches + batch) * SIZE
        row = spread[tensor] + batch * batch_stride + to * token_stride
        for first in range(0, SIZE, BLOCK):
            inside_X = first + number_X < SIZE
            tl.store(row + first + number_X, tl.load(source + first + number_X, mask=inside_X), mask=inside_X)
