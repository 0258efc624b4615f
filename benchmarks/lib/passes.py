"""Numbers that pass through memory in a transformer's blocks, between products of matrices and attention, counted.

Each operation reads its arguments once and writes its results once; caches are left out. A number is one of the
model's dtype: one in float32 counts twice where that has 16 bits.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest import mock

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from clear_dist.kernels import elementwise

ONLY_WRITTEN = ("copy_", "fill_", "zero_")
"""Operations that do not read what they change."""
WITHOUT_VALUES = ("empty", "empty_like", "new_empty", "empty_strided")


class Passes(TorchDispatchMode):
    """Bytes read and written, by index of the block at work; ours are seen by `counting`."""

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.bytes: Counter[int] = Counter()
        self._block: int | None = None
        for index, block in enumerate(blocks):
            block.register_forward_pre_hook(partial(self._begin, index))
            block.register_forward_hook(partial(self._begin, None))

    @contextmanager
    def counting(self) -> Iterator[None]:
        launch = elementwise._launch

        def launched(kernel: str, read: Sequence[Tensor], written: Sequence[Tensor], *rest: Any, **named: Any) -> None:
            self._count(map(held, (*read, *written)))
            launch(kernel, read, written, *rest, **named)

        with mock.patch.object(elementwise, "_launch", launched), self:
            yield

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        packet = function.overloadpacket
        if packet in flop_registry or packet.__name__ in WITHOUT_VALUES:
            return result
        given, made = tensors_in((args, kwargs)), tensors_in(result)
        if function._schema.is_mutable:
            given = given[packet.__name__ in ONLY_WRITTEN :]
        elif {x.untyped_storage()._cdata for x in given} & {x.untyped_storage()._cdata for x in made}:
            return result  # a view
        self._count(map(held, (*given, *made)))
        return result

    def _begin(self, index: int | None, *_: Any) -> None:
        self._block = index

    def _count(self, sizes: Iterator[int]) -> None:
        if self._block is not None:
            self.bytes[self._block] += sum(sizes)


def tensors_in(values: Any) -> list[Tensor]:
    return [x for x in tree_leaves(values) if isinstance(x, Tensor)]


def held(x: Tensor) -> int:
    """Bytes of its numbers, those that it repeats counted once."""
    sizes = (size for size, stride in zip(x.shape, x.stride(), strict=True) if stride)
    count = x.element_size()
    for size in sizes:
        count *= size
    return count
