"""The Triton kernel of `triton_window.py`: one program computes one tile of queries of one head.

Text keys come first, then the tiles of keys that the circle touches (`geometry.reached_tiles`). What is seen of a tile
depends only on its offset from the tile of queries: no mask is read.

Shape suffixes: Q queries of a tile, K keys of a tile, D head dim. Strides are those of [B, R, W, N, D], of [B, T, N, D]
for text and of [B, R, W, N] for the log-sum-exp, in elements.
"""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def product(left, right, total=None):
    """left @ right + total in float32; float32 matrices take three products on tensor cores, nearly exact."""
    if INTERPRETED:  # it would multiply the bits of bfloat16 as whole numbers
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, total, input_precision="tf32x3")


@triton.jit
def absorb(score_QK, value_KD, out_QD, weight_Q, maximum_Q, log2_scale):
    """One step of the online softmax: `out` sums e^(score - maximum) times values, `weight` e^(score - maximum)."""
    new_Q = tl.maximum(maximum_Q, tl.max(score_QK, 1))
    # A query that has seen no key yet has no maximum to subtract.
    anchor_Q = tl.where(new_Q == -float("inf"), 0.0, new_Q)
    share_QK = tl.exp2(score_QK * log2_scale - (anchor_Q * log2_scale)[:, None])
    shrunk_Q = tl.exp2((maximum_Q - anchor_Q) * log2_scale)
    out_QD = product(share_QK.to(value_KD.dtype), value_KD, out_QD * shrunk_Q[:, None])
    return out_QD, weight_Q * shrunk_Q + tl.sum(share_QK, 1), new_Q


@triton.jit
def see_text(
    query_QD, key, value, key_strides, value_strides, text, out_QD, weight_Q, maximum_Q, log2_scale,
    BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    token_K, dim_D = tl.arange(0, BLOCK), tl.arange(0, HEAD_DIM)
    key_KD = key + token_K[:, None] * key_strides[1] + dim_D * key_strides[3]
    value_KD = value + token_K[:, None] * value_strides[1] + dim_D * value_strides[3]
    whole = text // BLOCK * BLOCK
    for first in range(0, whole, BLOCK):
        score_QK = product(query_QD, tl.trans(tl.load(key_KD + first * key_strides[1])))
        values = tl.load(value_KD + first * value_strides[1])
        out_QD, weight_Q, maximum_Q = absorb(score_QK, values, out_QD, weight_Q, maximum_Q, log2_scale)
    if whole < text:
        present_K = whole + token_K < text
        keys = tl.load(key_KD + whole * key_strides[1], mask=present_K[:, None], other=0.0)
        values = tl.load(value_KD + whole * value_strides[1], mask=present_K[:, None], other=0.0)
        score_QK = product(query_QD, tl.trans(keys))
        score_QK = tl.where(present_K[None, :], score_QK, -float("inf"))
        out_QD, weight_Q, maximum_Q = absorb(score_QK, values, out_QD, weight_Q, maximum_Q, log2_scale)
    return out_QD, weight_Q, maximum_Q


@triton.jit
def hide(score_QK, y, x, radius, QUERIES: tl.constexpr, KEYS: tl.constexpr):
    """Scores with -inf for keys outside the circle; `y`, `x`: offset of the tile of keys from the tile of queries.

    dx^2 < radius^2 - dy^2, in floats that hold it exactly. Scores of one thread share few dx and few dy, so that little
    more than a comparison and a selection is left for each.
    """
    query_Q, key_K = tl.arange(0, QUERIES[0] * QUERIES[1]), tl.arange(0, KEYS[0] * KEYS[1])
    y_Q = y.to(tl.float32) - (query_Q // QUERIES[1]).to(tl.float32)
    x_Q = x.to(tl.float32) - (query_Q % QUERIES[1]).to(tl.float32)
    y_QK = y_Q[:, None] + (key_K // KEYS[1]).to(tl.float32)[None, :]
    x_QK = x_Q[:, None] + (key_K % KEYS[1]).to(tl.float32)[None, :]
    return tl.where(x_QK * x_QK < radius * radius - y_QK * y_QK, score_QK, -float("inf"))


@triton.jit
def visits(tiles, row, column, keys, FIRST: tl.constexpr, ROWS: tl.constexpr, SIZE: tl.constexpr):
    """(first row of tiles, first column of tiles with keys and the one after the last, number of tiles) to visit.

    `tiles` has the first column and the one after the last, for each of ROWS rows of tiles from FIRST on; `row` and
    `column` are the first query's in the keys, `keys` their rows and columns.
    """
    above = -(row + FIRST * SIZE[0])
    below = keys[0] + above
    begin = tl.minimum(tl.maximum(above, 0) // SIZE[0], ROWS)
    end = tl.minimum(tl.cdiv(tl.maximum(below, 0), SIZE[0]), ROWS)
    left, right = -tl.cdiv(column, SIZE[1]), tl.cdiv(keys[1] - column, SIZE[1])
    listed = tl.arange(0, triton.next_power_of_2(ROWS))
    visited = (listed >= begin) & (listed < end)
    first = tl.maximum(tl.load(tiles + 2 * listed, mask=visited, other=0), left)
    stop = tl.minimum(tl.load(tiles + 2 * listed + 1, mask=visited, other=0), right)
    return begin, left, right, tl.sum(tl.where(visited, stop - first, 0))


@triton.jit
def see_image(
    query_QD, key, value, key_strides, value_strides, tiles, row, column, keys, radius,
    out_QD, weight_Q, maximum_Q, log2_scale,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, FIRST: tl.constexpr, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    token_K, dim_D = tl.arange(0, KEYS[0] * KEYS[1]), tl.arange(0, HEAD_DIM)
    down_K, across_K = token_K // KEYS[1], token_K % KEYS[1]
    key_KD = (down_K * key_strides[1] + across_K * key_strides[2])[:, None] + dim_D * key_strides[4]
    value_KD = (down_K * value_strides[1] + across_K * value_strides[2])[:, None] + dim_D * value_strides[4]
    tile_y, left, right, count = visits(tiles, row, column, keys, FIRST, ROWS, KEYS)
    # One loop over all rows of tiles, so that loads run ahead from one row into the next. `tiles` has a row to spare.
    tile_x = tl.maximum(tl.load(tiles + 2 * tile_y), left)
    for _ in range(count):
        y, x = (FIRST + tile_y) * KEYS[0], tile_x * KEYS[1]
        key_row, key_column = row + y, column + x
        in_rows_K = (key_row + down_K >= 0) & (key_row + down_K < keys[0])
        inside_K = in_rows_K & (key_column + across_K >= 0) & (key_column + across_K < keys[1])
        first_key = key_row.to(tl.int64) * key_strides[1] + key_column.to(tl.int64) * key_strides[2]
        first_value = key_row.to(tl.int64) * value_strides[1] + key_column.to(tl.int64) * value_strides[2]
        tile_keys = tl.load(key + first_key + key_KD, mask=inside_K[:, None], other=0.0)
        values = tl.load(value + first_value + value_KD, mask=inside_K[:, None], other=0.0)
        score_QK = product(query_QD, tl.trans(tile_keys))
        far_y = tl.maximum(QUERIES[0] - 1 - y, y + KEYS[0] - 1)
        far_x = tl.maximum(QUERIES[1] - 1 - x, x + KEYS[1] - 1)
        cut = (key_row < 0) | (key_row + KEYS[0] > keys[0]) | (key_column < 0) | (key_column + KEYS[1] > keys[1])
        if far_y * far_y + far_x * far_x >= radius * radius:
            score_QK = hide(score_QK, y, x, radius, QUERIES, KEYS)
        if cut:
            score_QK = tl.where(inside_K[None, :], score_QK, -float("inf"))
        out_QD, weight_Q, maximum_Q = absorb(score_QK, values, out_QD, weight_Q, maximum_Q, log2_scale)
        ends = tile_x + 1 >= tl.minimum(tl.load(tiles + 2 * tile_y + 1), right)
        tile_y += ends.to(tl.int32)
        tile_x = tl.where(ends, tl.maximum(tl.load(tiles + 2 * tile_y), left), tile_x + 1)
    return out_QD, weight_Q, maximum_Q


@triton.jit
def finish(out_QD, lse_Q, inside_Q, sum_QD, weight_Q, maximum_Q, log2_scale, EXTENDS: tl.constexpr):
    """Store output and log-sum-exp of the queries `inside`; EXTENDS: joined with those that are there already."""
    # Queries beyond the border, which are not stored, may have seen nothing.
    weight_Q = tl.where(inside_Q, weight_Q, 1.0)
    log2_Q = maximum_Q * log2_scale + tl.log2(weight_Q)
    result_QD = sum_QD / weight_Q[:, None]
    if EXTENDS:
        there_Q = tl.load(lse_Q, mask=inside_Q, other=0.0) / LN_2
        # A query that had seen no key may hold NaN.
        there_QD = tl.load(out_QD, mask=(inside_Q & (there_Q > -float("inf")))[:, None], other=0.0)
        top_Q = tl.maximum(there_Q, log2_Q)
        share_Q, there_Q = tl.exp2(log2_Q - top_Q), tl.exp2(there_Q - top_Q)
        result_QD = result_QD * share_Q[:, None] + there_QD.to(tl.float32) * there_Q[:, None]
        result_QD /= (share_Q + there_Q)[:, None]
        log2_Q = top_Q + tl.log2(share_Q + there_Q)
    tl.store(out_QD, result_QD.to(out_QD.dtype.element_ty), mask=inside_Q[:, None])
    tl.store(lse_Q, log2_Q * LN_2, mask=inside_Q)


@triton.jit(do_not_specialize=("heads", "rows", "key_rows", "columns", "text", "row_offset", "radius"))
def window_kernel(
    query, key, value, key_text, value_text, out, lse, tiles,
    query_strides, key_strides, value_strides, key_text_strides, value_text_strides, out_strides, lse_strides,
    heads, rows, key_rows, columns, text, row_offset, radius, log2_scale,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, FIRST: tl.constexpr, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr,
    EXTENDS: tl.constexpr,
):  # fmt: skip
    """Programs: (tile of queries, batch and head). `rows`, `key_rows`: those of the images, `columns` of both.

    EXTENDS: `out` and `lse` hold attention to other keys, which these are added to.
    """
    tile, batch, head = tl.program_id(0), (tl.program_id(1) // heads).to(tl.int64), tl.program_id(1) % heads
    tiles_across = tl.cdiv(columns, QUERIES[1])
    row, column = tile // tiles_across * QUERIES[0], tile % tiles_across * QUERIES[1]
    token_Q, dim_D = tl.arange(0, QUERIES[0] * QUERIES[1]), tl.arange(0, HEAD_DIM)
    row_Q, column_Q = row + token_Q // QUERIES[1], column + token_Q % QUERIES[1]
    inside_Q = (row_Q < rows) & (column_Q < columns)
    row_Q, column_Q = row_Q.to(tl.int64), column_Q.to(tl.int64)

    query += batch * query_strides[0] + head * query_strides[3]
    query_Q = query + row_Q * query_strides[1] + column_Q * query_strides[2]
    query_QD = tl.load(query_Q[:, None] + dim_D * query_strides[4], mask=inside_Q[:, None], other=0.0)
    sum_QD = tl.zeros([QUERIES[0] * QUERIES[1], HEAD_DIM], tl.float32)
    weight_Q = tl.zeros([QUERIES[0] * QUERIES[1]], tl.float32)
    maximum_Q = tl.full([QUERIES[0] * QUERIES[1]], -float("inf"), tl.float32)

    key_text += batch * key_text_strides[0] + head * key_text_strides[2]
    value_text += batch * value_text_strides[0] + head * value_text_strides[2]
    sum_QD, weight_Q, maximum_Q = see_text(
        query_QD, key_text, value_text, key_text_strides, value_text_strides, text, sum_QD, weight_Q, maximum_Q,
        log2_scale, KEYS[0] * KEYS[1], HEAD_DIM,
    )  # fmt: skip
    key += batch * key_strides[0] + head * key_strides[3]
    value += batch * value_strides[0] + head * value_strides[3]
    sum_QD, weight_Q, maximum_Q = see_image(
        query_QD, key, value, key_strides, value_strides, tiles, row + row_offset, column, (key_rows, columns), radius,
        sum_QD, weight_Q, maximum_Q, log2_scale, QUERIES, KEYS, FIRST, ROWS, HEAD_DIM,
    )  # fmt: skip

    out += batch * out_strides[0] + head * out_strides[3]
    lse += batch * lse_strides[0] + head * lse_strides[3]
    finish(
        (out + row_Q * out_strides[1] + column_Q * out_strides[2])[:, None] + dim_D * out_strides[4],
        lse + row_Q * lse_strides[1] + column_Q * lse_strides[2],
        inside_Q, sum_QD, weight_Q, maximum_Q, log2_scale, EXTENDS,
    )  # fmt: skip
