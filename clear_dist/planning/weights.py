"""Bytes of weights on a rank."""

from clear_dist.planning.model import ModelSizes
from clear_dist.planning.request import PlanRequest

SCALE_BYTES = 4
"""Of each row of quantised weights."""
BLOCKS_GATHERED = 2
"""Of sharded weights: the one that computes, and the next one on its way."""


def weight_bytes_per_rank(
    model: ModelSizes,
    *,
    itemsize: int,
    ranks: int = 1,
    eight_bits: bool = False,
    hoisted: bool = False,
    sharded: bool = False,
) -> int:
    """Of the transformer, where it computes.

    Args:
        itemsize: bytes of a number that is not quantised.
        eight_bits: the products' weights in float8 or int8, with a scale for each row.
        hoisted: AdaLN's are in host memory.
        sharded: each rank has an equal part of every block, and gathers a block when it is needed.
    """
    saved = model.modulation * hoisted * itemsize
    whole = model.numbers * itemsize - saved
    if eight_bits:
        whole -= model.products * (itemsize - 1) - model.product_rows * SCALE_BYTES
    if not sharded or ranks == 1:
        return whole
    share = model.in_blocks / model.numbers  # hoisted and quantised weights are in blocks, nearly all of them
    in_blocks, largest = whole * share, whole * model.largest_block / model.numbers
    return round(whole - in_blocks + in_blocks / ranks + BLOCKS_GATHERED * largest)


def transformer_bytes(request: PlanRequest) -> int:
    """Of the transformer on each rank."""
    return weight_bytes_per_rank(
        request.model,
        itemsize=request.itemsize,
        ranks=request.ranks,
        eight_bits=request.float8 or request.int8,
        hoisted=request.hoist_modulation and request.on_cuda,
        sharded=request.shard_weights,
    )


def pinned_bytes(request: PlanRequest) -> int:
    """Of the modulation that all ranks of a machine keep in its host's memory, each its own."""
    hoisted = request.hoist_modulation and request.on_cuda
    return request.ranks * request.model.modulation * request.itemsize * hoisted


def text_encoder_bytes(request: PlanRequest) -> int:
    """Of the text encoders, which only rank 0 has."""
    return request.model.text.numbers * request.itemsize


def vae_bytes(request: PlanRequest) -> int:
    """Of the VAE on each rank."""
    return request.model.vae.numbers * request.itemsize
