"""A model without values, on the meta device: its weights counted, then cut down to a few blocks of each kind.

Blocks of a kind (one list, one class, equal shapes) need the same; what a further one adds is what the last one here
adds.
"""

from collections.abc import Callable, Mapping
from collections.abc import Set as AbstractSet
from copy import deepcopy
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from clear_dist.comm.counters import Counters
from clear_dist.comm.pretend import META, Pretended, share_of
from clear_dist.engine.family import Family
from clear_dist.families.transformers import model_family
from clear_dist.options import Options
from clear_dist.plan.allocated import Allocated
from clear_dist.weights.blocks import quantise_and_shard, tensors_of
from clear_dist.weights.quantised import QuantisedLinear, quantised, rounded

FEWEST = 2
"""Blocks of a kind: the second one shows what each further one adds."""


@dataclass(frozen=True, kw_only=True)
class Built:
    """A transformer with few blocks."""

    transformer: Any
    further: Mapping[int, int]
    """How many blocks of its kind the whole model has beyond those here, by the number of the last one here."""

    @property
    def family(self) -> Family:
        return model_family(self.transformer)

    def copy(self) -> "Built":
        return replace(self, transformer=deepcopy(self.transformer))

    def of_all(self, amount: Callable[[nn.Module], int]) -> int:
        """An amount of the whole model, given how much of it is in a module."""
        blocks = self.family.blocks
        further = sum(count * amount(blocks[number]) for number, count in self.further.items())
        return amount(self.transformer) + further

    @property
    def modulation(self) -> set[Tensor]:
        """Weights that `--hoist-modulation` keeps in host memory."""
        return {x for norm in self.family.modulated.values() for x in norm.linear.parameters()}

    @property
    def products(self) -> set[Tensor]:
        """Weights that all tokens are multiplied with."""
        return {self.transformer.get_submodule(name).weight for name in self.family.products}


def load(kind: str, config: Mapping[str, Any], dtype: str) -> Any:
    """A module of the class `library.Class`; raises ValueError where its configuration makes none."""
    library, _, name = kind.partition(".")
    try:
        with META:
            module = getattr(import_module(library), name).from_config(dict(config))
    except Exception as error:  # whatever a constructor finds
        raise ValueError(f"no {name} can be made of its configuration: {type(error).__name__}: {error}") from error
    return module.requires_grad_(False).to(getattr(torch, dtype)).eval()


def cut_down(transformer: Any) -> Built:
    """Leave two blocks of each kind."""
    blocks = model_family(transformer).blocks
    lists = {module: name.rpartition(".")[0] for name, module in transformer.named_modules()}
    kinds: dict[Any, list[nn.Module]] = {}
    for block in blocks:
        shapes = tuple((name, x.shape) for name, x in block.named_parameters())
        kinds.setdefault((lists[block], type(block), shapes), []).append(block)
    kept: set[nn.Module] = set()
    further: dict[nn.Module, int] = {}
    for alike in kinds.values():
        here = alike[:FEWEST]
        kept |= set(here)
        further[here[-1]] = len(alike) - len(here)
    for module in list(transformer.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.ModuleList) and set(child) & set(blocks):
                setattr(module, name, nn.ModuleList(block for block in child if block in kept))
    left = list(model_family(transformer).blocks)
    return Built(transformer=transformer, further={left.index(block): count for block, count in further.items()})


def quantise(built: Built, options: Options, group: Pretended) -> None:
    """Quantise as `options` say, in place."""
    elsewhere = built.modulation if options.hoist_modulation else set()
    whole = replace(options, shard_weights=False)
    quantise_and_shard(built.family, group, Counters(), whole, elsewhere=elsewhere)


def count_weights(built: Built, options: Options, device: str, group: Pretended) -> dict[str, int]:
    """Bytes of the transformer's weights on a rank's device, as `options` make them, in place; and numbers of some."""
    modulation, products = built.modulation, built.products
    counted = {
        "whole": built.of_all(lambda module: bytes_in(module)),
        "modulation": built.of_all(lambda module: bytes_in(module, modulation)),
        "modulation_outputs": built.of_all(
            lambda module: sum(len(x) for x in tensors_of(module) if x in modulation and x.ndim > 1)
        ),
        "products": built.of_all(lambda module: sum(x.numel() for x in tensors_of(module) if x in products)),
        "blocks": built.of_all(lambda module: sum(block in set(module.modules()) for block in built.family.blocks)),
    }
    elsewhere = modulation if options.hoist_modulation else set()
    besides = besides_quantised(built, options)
    quantise(built, options, group)
    blocks, sent = built.family.blocks, 0
    in_shards: set[Tensor] = set()
    if options.shard_weights and group.size > 1:
        in_shards = {x for block in blocks for x in block.parameters() if x not in elsewhere}
        shares = {block: share_of(block, group.size, whole=elsewhere) for block in blocks}
        sent = built.of_all(lambda module: sum(share for block, share in shares.items() if block in module.modules()))
    whole = tensors_in(built.transformer) - (elsewhere if device == "cuda" else set()) - in_shards
    small = {
        x
        for layer in built.transformer.modules()
        if isinstance(layer, QuantisedLinear)
        for x in (layer.weight, layer.weight_scale)
    }
    held = built.of_all(lambda module: bytes_in(module, whole))
    as_stored = built.of_all(lambda module: bytes_in(module, whole - small))
    loading = held + besides if device == "cuda" else counted["whole"]
    return counted | {"held": held + sent, "loading": loading, "sent": sent, "as_stored": as_stored}


def besides_quantised(built: Built, options: Options) -> int:
    """Most bytes that are alive besides the result while one of the layers is quantised: itself, and what it takes."""
    most = 0
    for weight in built.products if options.float8 or options.int8 else ():
        with Allocated() as allocated:
            result = (quantised if options.float8 else rounded)(weight)
        most = max(most, weight.nbytes + allocated.peak - sum(x.nbytes for x in result))
    return most


def tensors_in(module: nn.Module) -> set[Tensor]:
    return set(tensors_of(module))


def bytes_in(module: nn.Module, chosen: AbstractSet[Tensor] | None = None) -> int:
    return sum(x.nbytes for x in tensors_of(module) if chosen is None or x in chosen)
