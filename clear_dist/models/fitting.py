"""What makes a model fit on smaller GPUs: fewer bits, and a share of its blocks on each rank."""

from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from typing import Any

from torch import Tensor, nn

from clear_dist.comm.counters import Counters
from clear_dist.comm.group import Group
from clear_dist.comm.weight_shards import ShardedWeights
from clear_dist.models.adaptor import Adaptor
from clear_dist.models.float8 import to_float8
from clear_dist.models.int8 import to_int8


def quantise(adaptor: Adaptor, *, float8: bool, int8: bool) -> None:
    """The linear layers of the blocks, for good; raises ValueError where one is not plain, and changes nothing then."""
    if float8:
        to_float8(adaptor.transformer, adaptor.products)
    if int8:
        to_int8(adaptor.transformer, adaptor.products)


def shard_weights(
    adaptor: Adaptor, group: Group, counters: Counters, *, whole: AbstractSet[nn.Parameter]
) -> tuple[ShardedWeights, ...]:
    """Puts a transformer on the group's device, its blocks in shards; on one rank there are none, and nothing changes.

    The transformer may be in host memory, so that no GPU has to hold it whole; blocks come one after the other. All
    that changes weights (CLEAR's, 8 bits, a LoRA that is to be fused) comes before.

    Args:
        whole: parameters that stay as and where they are.
    """
    if group.size == 1:
        return ()
    in_blocks = {tensor for block in adaptor.blocks for tensor in tensors_of(block)}
    for tensor in tensors_of(adaptor.transformer):
        if tensor not in in_blocks and tensor not in whole:
            tensor.data = tensor.data.to(group.device)
    return (ShardedWeights(adaptor.blocks, group, counters, whole=whole),)


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
