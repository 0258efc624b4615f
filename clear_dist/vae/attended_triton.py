"""The Triton kernels of `attended.py`: a tile of weights from queries and keys, and weights times values.

Offsets stay below 2^31: queries, keys and weights are those of one block. Strides are of rows, in elements.

Shape suffixes: Q queries of a tile, K keys of a tile, D channels of a tile, N channels of a product's step.
"""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def product(left, right, total):
    """left @ right + total in float32."""
    if INTERPRETED:  # it would multiply the bits of bfloat16 as whole numbers
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, total)


@triton.jit
def channels_of(pointers, channel_N, HEAD_DIM: tl.constexpr, STEP: tl.constexpr):
    """Values at `pointers`, zero beyond the last channel; no mask where steps end with the head."""
    if HEAD_DIM % STEP == 0:
        return tl.load(pointers)
    return tl.load(pointers, mask=(channel_N < HEAD_DIM)[None, :], other=0.0)


@triton.jit
def weigh_kernel(
    query, key, weights, ceilings, sums, query_stride, key_stride, weight_stride, most, queries, keys, log2_scale,
    HEAD_DIM: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Weights of a tile, and the ceiling and the sum of each of its rows, which are [tiles, most] for all tiles."""
    row_Q = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    key_K = tl.program_id(1) * KEYS + tl.arange(0, KEYS)
    # Rows beyond the last are read as the last: cheaper than a mask, and nothing of them is kept.
    query_Q1 = query + tl.minimum(row_Q, queries - 1)[:, None] * query_stride
    key_K1 = key + tl.minimum(key_K, keys - 1)[:, None] * key_stride
    score_QK = tl.zeros((QUERIES, KEYS), tl.float32)
    for first in range(0, HEAD_DIM, STEP):
        channel_N = first + tl.arange(0, STEP)
        query_QN = channels_of(query_Q1 + channel_N[None, :], channel_N, HEAD_DIM, STEP)
        key_KN = channels_of(key_K1 + channel_N[None, :], channel_N, HEAD_DIM, STEP)
        score_QK = product(query_QN, tl.trans(key_KN), score_QK)
    score_QK = tl.where((key_K < keys)[None, :], score_QK * log2_scale, -float("inf"))
    ceiling_Q = tl.ceil(tl.max(score_QK, 1))
    # Sums are of what is added, rounded as it is: then one key that outweighs all others keeps its value.
    weight_QK = tl.exp2(score_QK - ceiling_Q[:, None]).to(weights.dtype.element_ty)
    present_Q = row_Q < queries
    at_Q = tl.program_id(1) * most + row_Q
    tl.store(ceilings + at_Q, ceiling_Q, mask=present_Q)
    tl.store(sums + at_Q, tl.sum(weight_QK.to(tl.float32), 1), mask=present_Q)
    tl.store(weights + row_Q[:, None] * weight_stride + key_K[None, :], weight_QK, mask=present_Q[:, None])


@triton.jit
def add_kernel(
    weights, value, total, ceilings, sums, ceiling, new_ceiling, sum_, new_sum,
    weight_stride, value_stride, most, queries, keys,
    HEAD_DIM: tl.constexpr, QUERIES: tl.constexpr, CHANNELS: tl.constexpr, KEYS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Weights times values added to `total`, all of them brought to the highest ceiling so far."""
    channel_D = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    row_Q = tl.program_id(1) * QUERIES + tl.arange(0, QUERIES)
    present_Q = row_Q < queries
    read_Q = tl.minimum(row_Q, queries - 1)
    tiles = tl.cdiv(keys, KEYS)
    old_Q = tl.load(ceiling + read_Q)
    highest_Q = old_Q
    for tile in range(0, tiles):
        highest_Q = tl.maximum(highest_Q, tl.load(ceilings + tile * most + read_Q))
    shrunk_Q = tl.exp2(old_Q - highest_Q)
    if tl.program_id(0) == 0:
        sum_Q = tl.load(sum_ + read_Q) * shrunk_Q
        for tile in range(0, tiles):
            factor_Q = tl.exp2(tl.load(ceilings + tile * most + read_Q) - highest_Q)
            sum_Q += tl.load(sums + tile * most + read_Q) * factor_Q
        tl.store(new_sum + row_Q, sum_Q, mask=present_Q)
        tl.store(new_ceiling + row_Q, highest_Q, mask=present_Q)
    total_QD = total + row_Q[:, None] * HEAD_DIM + channel_D[None, :]
    kept_QD = present_Q[:, None] & (channel_D < HEAD_DIM)[None, :]
    out_QD = tl.load(total_QD, mask=kept_QD, other=0.0) * shrunk_Q[:, None]
    for first in range(0, keys, STEP):
        key_K = first + tl.arange(0, STEP)
        factor_Q = tl.exp2(tl.load(ceilings + first // KEYS * most + read_Q) - highest_Q)
        weight_QK = tl.load(weights + read_Q[:, None] * weight_stride + key_K[None, :])
        weight_QK = (weight_QK.to(tl.float32) * factor_Q[:, None]).to(value.dtype.element_ty)
        value_KD = value + tl.minimum(key_K, keys - 1)[:, None] * value_stride + channel_D[None, :]
        out_QD = product(weight_QK, channels_of(value_KD, channel_D, HEAD_DIM, CHANNELS), out_QD)
    tl.store(total_QD, out_QD, mask=kept_QD)
