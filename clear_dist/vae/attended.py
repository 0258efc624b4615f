"""Attention of one wide head in blocks, two products each: for heads that no fused kernel has registers for.

    weigh    weights = 2^(scores - ceiling), for each query and tile of keys a ceiling of its own: a whole number, so
             that weights go from one to another by a power of two, which rounds nothing
    add      total = total * 2^(old - new) + weights * 2^(ceiling - new) @ values, new being the highest ceiling so far

Scores are never in memory, weights are, in 16 bits and for one block at a time. Sums and ceilings are float32.

Shape suffixes: L queries, S keys, D channels of the head, Q and K queries and keys of a block, T tiles of its keys.
"""

from dataclasses import dataclass
from math import isqrt, log2

import torch
from torch import Tensor

from clear_dist.kernels import power_of_two, shared_memory, usable

TILE = 256
"""Keys that share a ceiling: those of one program of `weigh_kernel`."""
QUERIES, STEP, WARPS = 128, 64, 8
"""Rows of a program of either kernel, channels or keys at a time, warps."""
LEAST_CHANNELS = 16
"""The fewest that Triton multiplies."""
FOR_THREE_STAGES = 150 * 1024
"""Bytes of shared memory for three tiles of either operand; GPUs with less (compute capability 8.6, 8.9, 12.x): two."""


@dataclass(frozen=True)
class Buffers:
    """Memory of one block, whatever the picture's size; used again for every block."""

    weights: Tensor
    """[Q, K]"""
    ceilings: Tensor
    """[T, Q], as the next one."""
    sums: Tensor
    total: Tensor
    """[Q, D]"""
    ceiling: Tensor
    """[2, Q], as the next one: over all blocks so far, before and after this one in turn."""
    sum: Tensor

    @classmethod
    def like(cls, query_LD: Tensor, max_bytes: int) -> "Buffers":
        """Weights of up to a quarter of `max_bytes`, for twice as many queries as keys, at least a tile of these."""
        keys = max(1, isqrt(max_bytes // 4 // query_LD.itemsize // 2) // TILE) * TILE
        queries = 2 * keys

        def floats(*shape: int) -> Tensor:
            return query_LD.new_empty(shape, dtype=torch.float32)

        return cls(
            weights=query_LD.new_empty(queries, keys),
            ceilings=floats(keys // TILE, queries),
            sums=floats(keys // TILE, queries),
            total=floats(queries, query_LD.shape[1]),
            ceiling=floats(2, queries),
            sum=floats(2, queries),
        )


def takes(device_type: str, dtype: torch.dtype) -> bool:
    """Whether there are kernels for it; the torch form below, a reference, is for any."""
    return usable(device_type) and dtype in (torch.bfloat16, torch.float16)


def attend(query_LD: Tensor, key_SD: Tensor, value_SD: Tensor, out_LD: Tensor, buffers: Buffers) -> None:
    """Write softmax(q k^T / sqrt(D)) v to `out_LD`; channels are contiguous, rows need not be."""
    queries, keys = buffers.weights.shape
    add_block = _add_by_kernels if takes(query_LD.device.type, query_LD.dtype) else _add_by_torch
    for first in range(0, len(query_LD), queries):
        query_QD = query_LD[first : first + queries]
        total_QD, sum_2Q = buffers.total.zero_()[: len(query_QD)], buffers.sum.zero_()
        buffers.ceiling.fill_(-torch.inf)
        blocks = range(0, len(key_SD), keys)
        for block, start in enumerate(blocks):
            rows = slice(start, start + keys)
            add_block(query_QD, key_SD[rows], value_SD[rows], buffers, block % 2)
        out_LD[first : first + queries] = total_QD.div_(sum_2Q[len(blocks) % 2, : len(query_QD), None])


def _add_by_torch(query_QD: Tensor, key_KD: Tensor, value_KD: Tensor, buffers: Buffers, before: int) -> None:
    """The block as the kernels compute it, in float32 but for the weights' rounding."""
    count, after = len(query_QD), 1 - before
    old_Q, total_QD = buffers.ceiling[before, :count], buffers.total[:count]
    scale = log2(torch.e) / query_QD.shape[1] ** 0.5
    tiles = [query_QD.float() @ tile_KD.float().T * scale for tile_KD in key_KD.split(TILE)]
    ceilings_TQ = torch.stack([score_QK.amax(1).ceil() for score_QK in tiles])
    new_Q = torch.maximum(old_Q, ceilings_TQ.amax(0))
    shrunk_Q = (old_Q - new_Q).exp2()
    total_QD.mul_(shrunk_Q[:, None])
    sum_Q = buffers.sum[before, :count] * shrunk_Q
    for score_QK, ceiling_Q, tile_KD in zip(tiles, ceilings_TQ, value_KD.split(TILE), strict=True):
        factor_Q = (ceiling_Q - new_Q).exp2()
        weight_QK = (score_QK - ceiling_Q[:, None]).exp2().to(value_KD.dtype).float()
        sum_Q += weight_QK.sum(1) * factor_Q
        total_QD.addmm_((weight_QK * factor_Q[:, None]).to(value_KD.dtype).float(), tile_KD.float())
    buffers.ceiling[after, :count], buffers.sum[after, :count] = new_Q, sum_Q


def _add_by_kernels(query_QD: Tensor, key_KD: Tensor, value_KD: Tensor, buffers: Buffers, before: int) -> None:
    from clear_dist.vae.attended_triton import add_kernel, weigh_kernel

    (count, channels), keys, after = query_QD.shape, len(key_KD), 1 - before
    assert query_QD.stride(1) == key_KD.stride(1) == value_KD.stride(1) == 1, "channels lie side by side"
    most, wide = len(buffers.total), min(TILE, max(LEAST_CHANNELS, power_of_two(channels)))
    scale = log2(torch.e) / channels**0.5
    stages = 3 if shared_memory(query_QD.device) >= FOR_THREE_STAGES else 2
    launch = {"HEAD_DIM": channels, "QUERIES": QUERIES, "KEYS": TILE, "num_warps": WARPS, "num_stages": stages}
    row_tiles, strides = -(-count // QUERIES), (buffers.weights.stride(0), most, count, keys)
    tables = buffers.weights, buffers.ceilings, buffers.sums
    with torch.cuda.device_of(query_QD):
        weigh_kernel[(row_tiles, -(-keys // TILE))](
            query_QD, key_KD, *tables, query_QD.stride(0), key_KD.stride(0), *strides, scale,
            STEP=min(STEP, wide), **launch,
        )  # fmt: skip
        add_kernel[(-(-channels // wide), row_tiles)](
            tables[0], value_KD, buffers.total, *tables[1:],
            buffers.ceiling[before], buffers.ceiling[after], buffers.sum[before], buffers.sum[after],
            strides[0], value_KD.stride(0), *strides[1:],
            CHANNELS=wide, STEP=STEP, **launch,
        )  # fmt: skip
