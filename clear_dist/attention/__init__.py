"""Attention on local tensors: check -> choose -> run.

Image queries see all text keys and the image keys of a circle around them (`window_attention`), text queries see
everything (`attend`); both return their log-sum-exp, so that `clear_dist.merge` can join calls.

Shape suffixes: B batch, R rows of queries, E rows of keys, W columns, N heads, T text tokens, D head dim.
"""

import logging
from dataclasses import replace
from difflib import get_close_matches

import torch
from torch import Tensor

from clear_dist.attention import flex, masked, reference, tiled, triton_window
from clear_dist.attention.backend import AMPERE, Backend, CallShape, WindowCall, capability, is_before_ampere
from clear_dist.attention.dense import attend, attend_masked
from clear_dist.attention.measured import nearest
from clear_dist.geometry import Rows, reach

__all__ = ["BACKENDS", "Backend", "attend", "attend_masked", "choose_backend", "extend_attention", "window_attention"]

logger = logging.getLogger(__name__)

BACKENDS = {
    backend.name: backend
    for backend in (
        flex.BACKEND,
        flex.FLASH_BACKEND,
        triton_window.BACKEND,
        tiled.BACKEND,
        masked.BACKEND,
        reference.BACKEND,
    )
}
"""In `auto`'s order where none was measured; a new kernel is a file, a row here and a name in ATTENTION_BACKENDS."""


def window_attention(
    query_BRWND: Tensor,
    key_BEWND: Tensor,
    value_BEWND: Tensor,
    key_text_BTND: Tensor,
    value_text_BTND: Tensor,
    *,
    radius: int,
    row_offset: int,
    scale: float | None = None,
    square: bool = False,
    backend: Backend,
    out_BRWND: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of image queries to all text keys and to the image keys of a circle (CLEAR, section 3.2).

    Args:
        radius: in tokens, at least 1; a key is seen if dx^2 + dy^2 < radius^2, strictly.
        row_offset: row i of the queries is row i + row_offset of the keys, which may lie wholly above or below.
        scale: factor of the scores, positive; None: 1 / sqrt(D).
        square: the square around the circle instead of it; dx^2 and dy^2 are both less.
        out_BRWND: where the output may be written, of any strides, and is by backends that can: then it is returned.

    Returns (out [B, R, W, N, D] in the queries' dtype, lse [B, R, W, N] in float32), 0 and -inf where no key is seen.
    Raises ValueError for shapes that don't fit together, a radius or scale out of range, or a backend that cannot run.
    """
    tensors = query_BRWND, key_BEWND, value_BEWND, key_text_BTND, value_text_BTND
    return _run(backend, _checked(tensors, radius, row_offset, scale, out_BRWND, square=square))


def extend_attention(
    query_BRWND: Tensor,
    key_BEWND: Tensor,
    value_BEWND: Tensor,
    key_text_BTND: Tensor,
    value_text_BTND: Tensor,
    *,
    radius: int,
    row_offset: int,
    scale: float | None = None,
    backend: Backend,
    out_BRWND: Tensor,
    lse_BRWN: Tensor,
) -> None:
    """Add keys to attention over others, in place: `out_BRWND` and `lse_BRWN` as `window_attention` returned them.

    Rows that see none of the new keys are not touched; an lse of -inf means no key yet, whatever the output. Arguments
    and errors are those of `window_attention`; only for backends with an `extend`.
    """
    assert backend.extend is not None, f"attention backend {backend.name} cannot extend attention"
    tensors = query_BRWND, key_BEWND, value_BEWND, key_text_BTND, value_text_BTND
    call = _checked(tensors, radius, row_offset, scale, out_BRWND)
    if lse_BRWN.shape != out_BRWND.shape[:-1] or lse_BRWN.dtype != torch.float32:
        raise ValueError(f"log-sum-exp must be float32 {out_BRWND.shape[:-1]}, got {lse_BRWN.dtype} {lse_BRWN.shape}")
    mine, visible = _cut_down(call)
    if visible.query.numel():
        _require(backend, visible.shape)
        backend.extend(visible, lse_BRWN[:, mine])


def choose_backend(
    name: str,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    head_dim: int = 0,
    heads: int = 1,
    rows: int = 0,
    key_rows: int = 0,
    columns: int = 0,
    text: int = 0,
    radius: int = 0,
    square: bool = False,
    anywhere: bool = False,
) -> Backend:
    """Backend called `name`; for `auto` the fastest in the nearest measured shape, else the first that can run.

    `heads` is batch times heads; sizes are in tokens, 0 where not known yet; `anywhere`: also where this machine lacks
    something for it. The log says why backends were skipped.
    Raises ValueError, naming what works, where `name` does not exist or cannot run here.
    """
    kind = torch.device(device).type, dtype, head_dim, heads
    shape = CallShape(*kind, rows, key_rows, columns, text, radius, square)
    if dtype == torch.bfloat16 and is_before_ampere(shape.device_type) and not anywhere:
        rule = f"bfloat16 needs a GPU of compute capability {AMPERE} or higher"
        raise ValueError(f"{rule}, got {capability()}; nearest: float16")
    if name == "auto":
        return _best(shape, anywhere=anywhere)
    if name not in BACKENDS:
        known = ", ".join(["auto", *BACKENDS])
        nearest = (get_close_matches(name, ["auto", *BACKENDS], n=1, cutoff=0.0) or ["auto"])[0]
        raise ValueError(f"attention backend must be one of {known}; got {name!r}; nearest: {nearest}")
    if not anywhere:
        _require(BACKENDS[name], shape)
    return BACKENDS[name]


def _best(shape: CallShape, *, anywhere: bool = False) -> Backend:
    measured = nearest(shape)
    if shape.rows:
        unmeasured = f"were not measured on {shape.device_type}: tried in their order"
        logger.info("attention backends %s", measured or unmeasured)
    fastest = [name for name in (measured.fastest_first if measured else ()) if name in BACKENDS]
    for name, backend in {name: BACKENDS[name] for name in (*fastest, *BACKENDS)}.items():
        reason = backend.why_not(shape) if anywhere else backend.why_not_here(shape)
        if shape.device_type not in backend.automatic_on and name not in fastest:
            reason = reason or f"on {shape.device_type} it is used only when asked for by name"
        if reason is None:
            return backend
        logger.info("attention backend %s skipped: %s", name, reason)
    raise ValueError(f"no attention backend can run {shape.dtype} on {shape.device_type}")


def _require(backend: Backend, shape: CallShape) -> None:
    if reason := backend.why_not_here(shape):
        raise ValueError(f"attention backend {backend.name} cannot run: {reason}; nearest: {_best(shape).name}")


def _run(backend: Backend, call: WindowCall) -> tuple[Tensor, Tensor]:
    """Run a checked call; only queries that see a key reach the backend."""
    mine, visible = _cut_down(call)
    if visible.query.numel():
        _require(backend, visible.shape)
        results = backend.run(visible)
        if visible.query.shape == call.query.shape:
            # The caller's own tensor, not a view of it: by that it knows that nothing is left to do.
            return call.out if call.out is not None and results[0] is visible.out else results[0], results[1]
    out_BRWND = torch.empty_like(call.query) if call.out is None else call.out
    lse_BRWN = call.query.new_full(call.query.shape[:-1], -torch.inf, dtype=torch.float32)
    for blind in (slice(mine.start), slice(mine.stop, None)):
        out_BRWND[:, blind] = 0
    if visible.query.numel():
        lse_BRWN[:, mine] = results[1]
        if results[0] is not visible.out:
            out_BRWND[:, mine] = results[0]
    return out_BRWND, lse_BRWN


def _cut_down(call: WindowCall) -> tuple[slice, WindowCall]:
    """Rows of queries that see a key, and the call for them and the rows of keys that they see."""
    queries = Rows(call.row_offset, call.row_offset + call.query.shape[1])
    seen = reach(queries, Rows(0, call.key.shape[1]), call.radius)
    seeing = queries if call.key_text.shape[1] else reach(seen, queries, call.radius)
    mine, keys = seeing.relative_to(call.row_offset), seen.relative_to(0)
    cut = replace(
        call,
        query=call.query[:, mine],
        key=call.key[:, keys],
        value=call.value[:, keys],
        row_offset=seeing.start - seen.start,
        out=None if call.out is None else call.out[:, mine],
    )
    return mine, cut


def _checked(
    tensors: tuple[Tensor, ...],
    radius: int,
    row_offset: int,
    scale: float | None,
    out_BRWND: Tensor | None,
    *,
    square: bool = False,
) -> WindowCall:
    """The call of queries, keys, values, text keys and text values that fit together."""
    query, key, text = (tensors[index].shape for index in (0, 1, 3))
    if len(query) != 5 or len(key) != 5 or len(text) != 4:
        raise ValueError(
            f"queries and keys must be [B, rows, W, N, D] and text [B, T, N, D], got {query}, {key}, {text}"
        )
    if query[:1] + query[2:] != key[:1] + key[2:] or query[:1] + query[3:] != text[:1] + text[2:]:
        raise ValueError(f"batch, columns, heads and head dim must be equal, got {query}, {key} and text {text}")
    if tensors[2].shape != key or tensors[4].shape != text:
        raise ValueError(f"values must have their keys' shape, got {tensors[2].shape} for {key}")
    if out_BRWND is not None and (out_BRWND.shape, out_BRWND.dtype) != (query, tensors[0].dtype):
        raise ValueError(
            f"the output must be {tensors[0].dtype} {query} as the queries, got {out_BRWND.dtype} {out_BRWND.shape}"
        )
    if radius < 1:
        raise ValueError(f"radius must be at least 1 token, got {radius}; nearest: 1")
    scale = query[-1] ** -0.5 if scale is None else scale
    if not scale > 0:
        raise ValueError(f"scale must be positive, got {scale}; nearest: {query[-1] ** -0.5:g}")
    names = "query", "key", "value", "key_text", "value_text"
    named = dict(zip(names, tensors, strict=True))
    return WindowCall(**named, radius=radius, row_offset=row_offset, scale=scale, square=square, out=out_BRWND)
