"""Memory and operations of all that runs inside, with values or without: who asked for how much, and when.

An allocation belongs to the row of a plan's table whose code asked for it, and to the block that ran.
"""

import sys
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from types import CodeType
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

ROWS = (
    ("clear_dist.engine.pooled_keys", "", "pooled keys"),
    ("clear_dist.comm.halo_exchange", "SendBuffers", "halos on their way"),
    ("clear_dist.comm.halo_exchange", "", "halos"),
    ("clear_dist.comm.text_", "", "text"),
    ("clear_dist.comm.pretend", "PretendedShell", "blocks gathered"),
    ("clear_dist.attention.masked", "bias", "masks"),
    ("clear_dist.vae", "", "VAE activations"),
    ("clear_dist.attention", "", "attention"),
    ("clear_dist.engine.joint_attention", "", "attention"),
    ("clear_dist.comm.rows", "", "latents"),
    ("clear_dist.families", "empty_inputs", "latents"),
    ("clear_dist.plan.stepped", "_new_latents", "latents"),
    ("clear_dist.families", "", "activations"),
)
"""Module, class or function, and the row of what they allocate; the first of them that is at work counts."""
PRODUCTS, CONVOLUTIONS, ATTENTION = "products", "convolutions", "attention"
KINDS = {"convolution": CONVOLUTIONS, "mm": PRODUCTS, "addmm": PRODUCTS, "bmm": PRODUCTS, "_scaled_mm_v2": PRODUCTS}
FUSED = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
COPY, UNSAFE_VIEW = torch.ops.aten.copy_.default, torch.ops.aten._unsafe_view.default
META = torch.device("meta")


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
        self._alive: dict[int, tuple[int, str, int | None, Any]] = {}
        self._by_row: Counter[str] = Counter()
        self._is_fusing = False
        self._unmade: dict[int, Any] = {}
        """Storages that a compiled graph would not make."""

    def begin(self) -> None:
        """Forget the peak and the operations so far."""
        self.operations.clear()
        self.peak, self.at_peak, self.where = self.bytes, self.by_row(), ""

    def by_row(self) -> "Counter[str]":
        """Bytes that are alive."""
        return Counter(self._by_row)

    def kept_by(self, block: int) -> "Counter[str]":
        """Bytes that are alive since this block asked for them, by row."""
        kept: Counter[str] = Counter()
        for size, row, owner, _ in self._alive.values():
            if owner == block:
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
        if function is COPY and args[0].is_meta:
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
            found = tuple(tensors_in((result,)))
            if len(found) == 1 and isinstance(result, Tensor):
                known[key] = found[0].shape, found[0].stride(), found[0].dtype
            return result
        shape, stride, dtype = known[key]
        return torch.empty_strided(shape, stride, dtype=dtype, device=META)

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
        while frame is not None:
            index = row_of(frame.f_code, frame.f_globals.get("__name__", ""))
            if index is not None:
                found, where = min(found, index), where or frame.f_code.co_qualname
            frame = frame.f_back
        return ROWS[found][2] if found < len(ROWS) else self.row, where


class FusedAttention(TorchFunctionMode):
    """PyTorch's attention by a kernel that holds no scores, also on the meta device, which would take another."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is scaled_dot_product_attention and args[0].is_meta:
            return FUSED(*args[:3], attn_mask=kwargs.get("attn_mask"), scale=kwargs.get("scale"))[0]
        return function(*args, **kwargs)


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
    """Shape, stride and dtype of results, by operation and arguments."""
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
def only_views(function: Any) -> bool:
    """Whether an operation always changes its arguments, or returns views; one made of others may copy as well."""
    composite = torch._C._dispatch_has_kernel_for_dispatch_key(function.name(), "CompositeImplicitAutograd")
    return not makes_new_tensors(function) and not composite


@cache
def row_of(code: CodeType, module: str) -> int | None:
    """Index among ROWS of what a function allocates; one beyond them for others of this package's functions."""
    if not module.startswith("clear_dist.") or module == __name__:
        return None
    found = (
        index for index, (room, owner, _) in enumerate(ROWS) if module.startswith(room) and owner in code.co_qualname
    )
    return next(found, len(ROWS))
