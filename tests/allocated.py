"""Bytes of all tensors alive, counted while operations run; on the meta device at sizes that fit nowhere."""

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from clear_dist.engine.stock import attention_layers


class Allocated(TorchDispatchMode):
    """Counts what operations inside make, from the first to the last reference to it."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        result = function(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor):
                self._count(x.untyped_storage(), given)
        return result

    def _count(self, storage: torch.UntypedStorage, given: set[int]) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in given or key in self._known:
            return
        self._known.add(key)
        self.bytes += size
        self.peak = max(self.peak, self.bytes)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.bytes -= size


def put_on(family: Any, striped: Any) -> None:
    """A family's processors and hooks on its transformer, for an engine of the test's own."""
    layers = attention_layers(family.transformer)
    for name, processor in family.processors(striped).items():
        layers[name].set_processor(processor)
    family.hooks(striped)
