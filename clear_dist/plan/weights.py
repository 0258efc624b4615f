"""Bytes of weights on a rank."""

from collections import Counter
from dataclasses import dataclass
from math import ceil, prod

from clear_dist.plan.model import ModelSizes, Shape

SCALE_BYTES = 4
"""Of each row of quantised weights."""
BLOCKS_GATHERED = 2
"""Of sharded weights: the one that computes, and the next one on its way."""


@dataclass(frozen=True, kw_only=True)
class WeightBytes:
    """Of the transformer on one rank."""

    held: int
    """All the time."""
    gathered: int
    """While it computes, besides: blocks whose weights are in shards."""
    sent: int
    """What it hands over in one pass: its share of all that is in shards, once."""
    as_stored: int
    """Of what is held, what may still be the pages of the files that it came from."""


def weights_per_rank(
    model: ModelSizes,
    *,
    itemsize: int,
    ranks: int = 1,
    eight_bits: bool = False,
    hoisted: bool = False,
    sharded: bool = False,
) -> WeightBytes:
    """Of the transformer, where it computes.

    Args:
        itemsize: bytes of a number that is not quantised.
        eight_bits: the products' weights in float8 or int8, with a scale for each row, which is no part of the shards.
        hoisted: AdaLN's are in host memory.
        sharded: each rank has a share of the rows of every tensor in a block, and gathers a block when it is needed.
    """
    shards = ranks if sharded else 1
    whole = scales = as_stored = 0
    shares: Counter[str] = Counter()
    for weight in model.weights:
        if hoisted and weight.is_modulation:
            continue
        quantised = eight_bits and weight.is_product
        size = 1 if quantised else itemsize
        scales += weight.shape[0] * SCALE_BYTES * quantised
        if shards > 1 and weight.block is not None:
            shares[weight.block] += share_of(weight.shape, shards) * size
            continue
        whole += weight.numbers * size
        as_stored += weight.numbers * size * (not quantised)
    mine = sum(shares.values())
    return WeightBytes(
        held=whole + scales + mine,
        gathered=BLOCKS_GATHERED * shards * max(shares.values(), default=0),
        sent=mine,
        as_stored=as_stored,
    )


def share_of(shape: Shape, ranks: int) -> int:
    """Numbers of one rank's part of a tensor: whole rows, as many on all ranks."""
    return ceil(shape[0] / ranks) * prod(shape[1:])
