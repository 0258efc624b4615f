"""Blocks for smaller GPUs: quantised, and sharded over ranks."""

from collections.abc import Iterator
from collections.abc import Set as AbstractSet

import torch
from torch import Tensor, nn

from clear_dist.comm.counters import Counters
from clear_dist.comm.group import Group
from clear_dist.comm.weight_shards import ShardedWeights
from clear_dist.engine.family import Family
from clear_dist.options import Options
from clear_dist.weights.quantised import plain_layers, to_float8, to_int8


def quantise_and_shard(
    family: Family, group: Group, counters: Counters, options: Options, *, elsewhere: AbstractSet[Tensor]
) -> tuple[ShardedWeights, ...]:
    """Quantise the blocks' linear layers, for good, and shard the blocks, until undone; one rank shards nothing.

    Sharded blocks come to the group's device one by one and are quantised there, so that no memory has to hold all.
    Other changes of weights (CLEAR's, a LoRA to be fused) come first; weights `elsewhere` stay as and where they are.
    """
    transformer, shards = family.transformer, options.shard_weights and group.size > 1
    quantise = to_float8 if options.float8 else to_int8 if options.int8 else None
    if shards:
        of_blocks = {tensor for block in family.blocks for tensor in tensors_of(block)}
        bring(transformer, group.device, but=of_blocks | elsewhere)

    def ready() -> Iterator[nn.Module]:
        for block in family.blocks:
            if shards:
                bring(block, group.device, but=elsewhere)
            if quantise is not None:
                modules = set(block.modules())
                quantise(transformer, [name for name in family.products if transformer.get_submodule(name) in modules])
            yield block

    if shards:
        return (ShardedWeights(ready(), group, counters, whole=elsewhere),)
    for _ in ready():
        pass
    return ()


def require_quantisable(*families: Family, options: Options) -> None:
    """Raises ValueError where a layer to be quantised, of any model, is not plain; before any is changed."""
    for family in families if options.float8 or options.int8 else ():
        plain_layers(family.transformer, family.products, "float8" if options.float8 else "int8")


def bring(module: nn.Module, device: torch.device, *, but: AbstractSet[Tensor]) -> None:
    for tensor in tensors_of(module):
        if tensor not in but:
            tensor.data = tensor.data.to(device)


def tensors_of(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()
