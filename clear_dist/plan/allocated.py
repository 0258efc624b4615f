"""Memory and operations of all that runs inside, with values or without: who asked for how much, and when.

An allocation belongs to the row of a plan's table whose code asked for it, and to the block that ran.
"""

import sys
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

from clear_dist.comm.pretend import META

ON_THEIR_WAY = "halos on their way"
ROWS = (
    ("comm/halo_exchange", "SendBuffers", ON_THEIR_WAY),
    ("engine/pooled_keys", "", "pooled keys"),
    ("comm/halo_exchange", "", "halos"),
    ("comm/text_", "", "text"),
    ("comm/pretend", "PretendedShell", "blocks gathered"),
    ("attention/masked", "bias", "masks"),
    ("vae", "", "VAE activations"),
    ("attention", "", "attention"),
    ("engine/joint_attention", "", "attention"),
    ("comm/rows", "", "latents"),
    ("engine/step_cache", "", "step cache"),
    ("families", "empty_inputs", "latents"),
    ("plan/stepped", "_new_latents", "latents"),
    ("families", "", "activations"),
)
"""File, class or function, and the row of what they allocate; the first of them that is at work counts."""
PACKAGE = f"{Path(__file__).parents[1]}/"
PRODUCTS, CONVOLUTIONS, ATTENTION = "products", "convolutions", "attention"
KINDS = {"convolution": CONVOLUTIONS, "mm": PRODUCTS, "addmm": PRODUCTS, "bmm": PRODUCTS, "_scaled_mm_v2": PRODUCTS}
FUSED = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
UNSAFE_VIEW = torch.ops.aten._unsafe_view.default


def _fused_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *_: Any, **__: Any
) -> Tensor:
    return FUSED(query, key, value, attn_mask=attn_mask)[0]


ATEN = torch.library.Library("aten", "IMPL")
"""Keeps PyTorch's attention on tensors without values what it is on others: by a kernel that holds no scores."""
ATEN.impl("scaled_dot_product_attention", _fused_attention, "AutogradMeta")


class Allocated(TorchDispatchMode):
    """Bytes alive and operations of everything inside."""

    def __init__(self, row: str = "activations") -> None:
        """`row` is that of what no code of ROWS asks for."""
        super().__init__()
        self.row = row
        self.block: int | None = None
        """Number of the block that runs."""
        self.bytes = 0
        self.peak = 0
        self.at_peak: Counter[str] = Counter()
        """Bytes by row, when most was alive."""
        self.where = ""
        """Function that asked for memory then."""
        self.peaks: dict[str, int] = {}
        """Most bytes alive when a function asked for more."""
        self.operations: Counter[tuple[int | None, str]] = Counter()
        """By block and kind."""
        self._outermost: Any = None
        self._alive: dict[int, tuple[int, str, int | None, Any]] = {}
        self._by_row: Counter[str] = Counter()
        self._is_fusing = False
        self._unmade: dict[int, Any] = {}
        """Storages that a compiled graph would not make."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing is compiled inside, and to ask torch for that each time takes long."""
        return False

    def __enter__(self) -> Any:
        self._outermost = sys._getframe(1)
        return super().__enter__()

    def by_row(self) -> "Counter[str]":
        """Bytes that are alive."""
        return Counter(self._by_row)

    def kept_by(self, block: int) -> "Counter[str]":
        """Bytes that are alive since this block asked for them, by row, but for what any block uses again."""
        kept: Counter[str] = Counter()
        for size, row, owner, _ in self._alive.values():
            if owner == block and row != ON_THEIR_WAY:
                kept[row] += size
        return kept

    @contextmanager
    def fusing(self) -> Iterator[None]:
        """Context of a compiled graph: what only goes from one operation to the next is never in memory.

        What a product of matrices reads is, and what it puts out.
        """
        self._is_fusing = True
        try:
            yield
        finally:
            self._is_fusing = False

    def make(self, x: Tensor) -> None:
        """Count a result of a compiled graph."""
        if self._unmade.pop(x.untyped_storage()._cdata, None) is not None:
            self._count(x.untyped_storage())

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if writes_in_place(function) and args[0].is_meta:
            return args[0]
        if only_views(function):
            return function(*args, **kwargs)
        given = list(tensors_in((*args, *kwargs.values())))
        result = self._result(function, args, kwargs, given)
        is_product = self._operate(function.overloadpacket, args, kwargs, result)
        for x in given if is_product and self._unmade else ():
            self.make(x)
        known = {x.untyped_storage()._cdata for x in given}
        for x in tensors_in((result,)):
            storage = x.untyped_storage()
            if storage._cdata in known:
                continue
            if self._is_fusing and not is_product:
                key = storage._cdata
                self._unmade[key] = weakref.ref(storage, partial(self._drop, key))
            else:
                self._count(storage)
        return result

    def _result(self, function: Any, args: Any, kwargs: Any, given: list[Tensor]) -> Any:
        """What the operation returns; without values from memory, which is several times as fast."""
        if not given or not makes_new_tensors(function) or not all(x.is_meta for x in given):
            return function(*args, **kwargs)
        key, known = (function, described(args), described(kwargs.items())), layouts()
        if key not in known:
            result = function(*args, **kwargs)
            several = result if isinstance(result, tuple) else (result,)
            if all(isinstance(x, Tensor) for x in several):
                known[key] = isinstance(result, tuple), described(several)
            return result
        is_tuple, found = known[key]
        made = tuple(torch.empty_strided(shape, stride, dtype=dtype, device=META) for shape, stride, dtype in found)
        return made if is_tuple else made[0]

    def _operate(self, packet: Any, args: Any, kwargs: Any, result: Any) -> bool:
        """Count an operation's work; returns whether it is a product of matrices or alike."""
        kind = KINDS.get(packet.__name__)
        if kind is not None:
            count = flop_registry.get(packet, lambda a, b, *_, out_val, **__: 2 * out_val.numel() * a.shape[-1])
            self.operations[self.block, kind] += count(*args, **kwargs, out_val=result)
        elif packet is FUSED:
            self.operations[self.block, ATTENTION] += sdpa_flop_count(*(x.shape for x in args[:3]))
        return kind is not None or packet is FUSED

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive or not size:
            return
        row, where = self._asking()
        self._alive[key] = size, row, self.block, weakref.ref(storage, partial(self._forget, key))
        self._by_row[row] += size
        self.bytes += size
        self.peaks[where] = max(self.peaks.get(where, 0), self.bytes)
        if self.bytes > self.peak:
            self.peak, self.at_peak, self.where = self.bytes, self.by_row(), where

    def _drop(self, key: int, _: object) -> None:
        self._unmade.pop(key, None)

    def _forget(self, key: int, _: object) -> None:
        size, row, *_ = self._alive.pop(key)
        self._by_row[row] -= size
        self.bytes -= size

    def _asking(self) -> tuple[str, str]:
        """Row and function of the code that asks for memory now."""
        frame: Any = sys._getframe(3)
        found, where = len(ROWS), ""
        while frame is not None and frame is not self._outermost:
            code = frame.f_code
            index = row_of(code.co_filename, code.co_qualname)
            if index is not None:
                found, where = min(found, index), where or code.co_qualname
            frame = frame.f_back
        return ROWS[found][2] if found < len(ROWS) else self.row, where


def tensors_in(values: Iterable[Any]) -> Iterator[Tensor]:
    """Tensors among values and in lists and tuples of them."""
    for x in values:
        if isinstance(x, Tensor):
            yield x
        elif isinstance(x, list | tuple):
            yield from tensors_in(x)


def described(values: Iterable[Any]) -> tuple[Any, ...]:
    """Values that can be compared, tensors by their layout."""
    return tuple(
        (x.shape, x.stride(), x.dtype) if isinstance(x, Tensor) else described(x) if isinstance(x, list | tuple) else x
        for x in values
    )


@cache
def layouts() -> dict[Any, Any]:
    """Whether the result is a tuple, and shape, stride and dtype of all, by operation and arguments."""
    return {}


@cache
def makes_new_tensors(function: Any) -> bool:
    """Whether an operation never changes its arguments, nor returns them or views of them."""
    schema = function._schema
    return (
        function is not UNSAFE_VIEW
        and not schema.is_mutable
        and all(each.alias_info is None for each in schema.returns)
    )


@cache
def writes_in_place(function: Any) -> bool:
    """Whether an operation returns its first argument, of which it changes the values only."""
    schema = function._schema
    is_such = schema.name.startswith("aten::") and schema.name.endswith("_") and len(schema.returns) == 1
    return is_such and torch.Tag.inplace_view not in function.tags


@cache
def only_views(function: Any) -> bool:
    """Whether all it does is to change its arguments, or return views; one made of others may copy as well."""
    composite = torch._C._dispatch_has_kernel_for_dispatch_key(function.name(), "CompositeImplicitAutograd")
    is_work = function.overloadpacket.__name__ in KINDS
    return not makes_new_tensors(function) and not composite and not is_work


@cache
def row_of(file: str, function: str) -> int | None:
    """Index among ROWS of what a function allocates; one beyond them for others of this package's functions."""
    if not file.startswith(PACKAGE) or file == __file__:
        return None
    name = file.removeprefix(PACKAGE)
    found = (index for index, (room, owner, _) in enumerate(ROWS) if name.startswith(room) and owner in function)
    return next(found, len(ROWS))
