"""Blocks for smaller GPUs: quantised, and sharded over ranks."""

from collections import deque
from collections.abc import Iterator
from collections.abc import Set as AbstractSet

from torch import Tensor, nn

from clear_dist.comm.counters import Counters
from clear_dist.comm.group import Group
from clear_dist.comm.weight_shards import ShardedWeights
from clear_dist.engine.family import Family
from clear_dist.observe.peaks import give_back
from clear_dist.options import Options
from clear_dist.weights.quantised import plain_layers, to_float8, to_int8


def quantise_and_shard(
    family: Family, group: Group, counters: Counters, options: Options, *, elsewhere: AbstractSet[Tensor]
) -> tuple[ShardedWeights, ...]:
    """Quantise the blocks' linear layers, for good, and shard the blocks, until undone; one rank shards nothing.

    What is not on the group's device comes there layer by layer, each quantised and each block sharded before the next
    comes, so that no memory has to hold all. Other changes of weights (CLEAR's, a LoRA to be fused) come first; weights
    `elsewhere` stay as and where they are.
    """
    transformer, shards = family.transformer, options.shard_weights and group.size > 1
    quantise = to_float8 if options.float8 else to_int8 if options.int8 else None
    brings = shards or not are_brought_by_others(transformer)

    def bring(module: nn.Module, but: AbstractSet[Tensor]) -> None:
        if brings:
            module._apply(lambda x: x if x in but else x.to(group.device))

    def ready() -> Iterator[nn.Module]:
        for block in family.blocks:
            if quantise is not None:
                for name in products_of(family, block):
                    bring(transformer.get_submodule(name), elsewhere)
                    quantise(transformer, [name])
            bring(block, elsewhere)
            yield block

    # Nothing in here may hold a weight that is replaced: it would stay on the device.
    bring(transformer, elsewhere | {tensor for block in family.blocks for tensor in tensors_of(block)})
    in_shards: tuple[ShardedWeights, ...] = ()
    if shards:
        in_shards = (ShardedWeights(ready(), group, counters, whole=elsewhere),)
    else:
        deque(ready(), maxlen=0)
    give_back(group.device)
    return in_shards


def products_of(family: Family, block: nn.Module) -> list[str]:
    """Names of a block's linear layers that all tokens go through."""
    modules = set(block.modules())
    return [name for name in family.products if family.transformer.get_submodule(name) in modules]


def are_brought_by_others(model: nn.Module) -> bool:
    """Whether hooks, of accelerate or diffusers, move weights of a model as they are needed."""
    return any(hasattr(module, "_hf_hook") or hasattr(module, "_diffusers_hook") for module in model.modules())


def require_quantisable(*families: Family, options: Options) -> None:
    """Raises ValueError where a layer to be quantised, of any model, is not plain; before any is changed."""
    for family in families if options.float8 or options.int8 else ():
        plain_layers(family.transformer, family.products, "float8" if options.float8 else "int8")


def tensors_of(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()
