"""What makes a model fit on smaller GPUs: fewer bits, and a share of its blocks on each rank."""

from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from typing import Any

import torch
from torch import Tensor, nn

from clear_dist.comm.counters import Counters
from clear_dist.comm.group import Group
from clear_dist.comm.weight_shards import ShardedWeights
from clear_dist.engine.family import Adaptor
from clear_dist.engine.settings import Settings
from clear_dist.options import Options
from clear_dist.weights.quantised import plain_layers, to_float8, to_int8


def fit(
    adaptor: Adaptor,
    group: Group,
    counters: Counters,
    settings: Settings,
    *,
    elsewhere: AbstractSet[Tensor],
) -> tuple[ShardedWeights, ...]:
    """Quantises the linear layers of the blocks, for good, and puts blocks in shards, for a while: none on one rank.

    What is sharded may be in host memory. It comes to the group's device block by block, where it is quantised, so that
    neither has to hold all of it. All else that changes weights (CLEAR's, a LoRA that is to be fused) comes before.

    Args:
        elsewhere: weights that stay as and where they are.
    """
    transformer, shards = adaptor.transformer, settings.options.shard_weights and group.size > 1
    float8, int8 = settings.options.float8, settings.options.int8
    if shards:
        of_blocks = {tensor for block in adaptor.blocks for tensor in tensors_of(block)}
        bring(transformer, group.device, but=of_blocks | elsewhere)

    def fitted() -> Iterator[nn.Module]:
        for block in adaptor.blocks:
            if shards:
                bring(block, group.device, but=elsewhere)
            if float8 or int8:
                (to_float8 if float8 else to_int8)(transformer, names_within(block, adaptor))
            yield block

    if shards:
        return (ShardedWeights(fitted(), group, counters, whole=elsewhere),)
    for _ in fitted():
        pass
    return ()


def require_quantisable(*adaptors: Adaptor, options: Options) -> None:
    """Before anything is changed, of all models: raises ValueError where a layer to be quantised is not plain."""
    for adaptor in adaptors if options.float8 or options.int8 else ():
        plain_layers(adaptor.transformer, adaptor.products, "float8" if options.float8 else "int8")


def names_within(block: nn.Module, adaptor: Adaptor) -> list[str]:
    """Of the products of one block."""
    modules = set(block.modules())
    return [name for name in adaptor.products if adaptor.transformer.get_submodule(name) in modules]


def bring(module: nn.Module, device: torch.device, *, but: AbstractSet[Tensor]) -> None:
    """Moves parameters and buffers, but for some."""
    for tensor in tensors_of(module):
        if tensor not in but:
            tensor.data = tensor.data.to(device)


def weight_bytes(transformer: nn.Module, *, but: AbstractSet[Tensor]) -> int:
    """Of the parameters and buffers that this rank holds; of what is in shards, its own.

    Args:
        but: those that do not count.
    """
    tensors: Iterator[Any] = tensors_of(transformer)
    mine = (tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in tensors if tensor not in but)
    return sum(tensor.nbytes for tensor in mine)


def tensors_of(module: nn.Module) -> Iterator[Tensor]:
    """Its parameters and buffers."""
    yield from module.parameters()
    yield from module.buffers()
