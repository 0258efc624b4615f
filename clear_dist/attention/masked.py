"""Windowed attention under a mask, by PyTorch's own attention: at once, or on a CPU in bands of query rows.

For images not much larger than their circles; masks are kept for all layers, heads and steps. A band sees the rows of
keys that its circles reach; all bands share a mask, of which each takes a part, and their text has a call of its own.

Shape suffixes: B batch, R rows of queries, E rows of keys, W columns, N heads, T text tokens, D head dim, L queries,
S text and image keys.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache, partial

import torch
from torch import Tensor
from torch.nn.functional import pad

from clear_dist.attention.apart import with_text_apart
from clear_dist.attention.backend import Backend, CallShape, Geometry, WindowCall, squared_distance
from clear_dist.attention.dense import BIAS_ALIGNMENT, fused, heads_last
from clear_dist.geometry import Rows, reach

BAND_QUERIES = 256
"""A band's mask stays in the cache, and from 192 queries on the CPU's kernel takes larger blocks."""
MOST_MASK_BYTES = 2**27
"""Limit of one mask; that of all 64 x 64 image tokens and 512 text tokens takes 75 MB in float32."""
MASKS_KEPT = 3
"""Own keys and two halos."""


def run(call: WindowCall) -> tuple[Tensor, Tensor]:
    return run_on_cpu(call) if call.query.device.type == "cpu" else _at_once(call, _mask(call))


def run_on_cpu(call: WindowCall, band_queries: int | None = None) -> tuple[Tensor, Tensor]:
    rows = band_rows(call.shape) if band_queries is None else max(1, band_queries // call.query.shape[2])
    if call.query.shape[1] <= rows:
        return _at_once(call, _mask(call))
    in_bands = partial(_in_bands, rows=rows)
    return with_text_apart(call, in_bands) if call.key_text.shape[1] and call.sees_itself else in_bands(call)


def band_rows(shape: CallShape) -> int:
    """Rows of queries in a band; all of them where every query sees all rows of keys."""
    sees_all = max(shape.rows, shape.key_rows) <= shape.radius
    return shape.rows if sees_all or not shape.radius else max(1, BAND_QUERIES // shape.columns)


def _in_bands(call: WindowCall, rows: int) -> tuple[Tensor, Tensor]:
    parts = [_at_once(band, _band_mask(band, rows)) for band in _bands(call, rows)]
    outs, lses = zip(*parts, strict=True)
    return torch.cat(outs, dim=1), torch.cat(lses, dim=1)


def _bands(call: WindowCall, rows: int) -> Iterator[WindowCall]:
    """Calls of at most `rows` rows of queries, and the rows of keys that their circles reach."""
    for start in range(0, call.query.shape[1], rows):
        query_BRWND = call.query[:, start : start + rows]
        queries = Rows(start + call.row_offset, start + call.row_offset + query_BRWND.shape[1])
        seen = reach(queries, Rows(0, call.key.shape[1]), call.radius)
        keys = seen.relative_to(0)
        yield replace(
            call,
            query=query_BRWND,
            key=call.key[:, keys],
            value=call.value[:, keys],
            row_offset=queries.start - seen.start if len(seen) else 0,
        )


def _at_once(call: WindowCall, mask_LS: Tensor) -> tuple[Tensor, Tensor]:
    grid = call.query.shape[1:3]
    key_BSND, value_BSND = (
        torch.cat([text, image.flatten(1, 2)], dim=1) if text.shape[1] else image.flatten(1, 2)
        for text, image in ((call.key_text, call.key), (call.value_text, call.value))
    )
    out_BLND, lse_BLN = heads_last(
        *fused(
            call.query.flatten(1, 2).contiguous().transpose(1, 2),  # the kernels take no others' last dimension
            key_BSND.transpose(1, 2),
            value_BSND.transpose(1, 2),
            call.scale,
            mask_LS,
        )
    )
    return out_BLND.unflatten(1, grid), lse_BLN.unflatten(1, grid)


def _mask(call: WindowCall) -> Tensor:
    return bias(call.geometry, call.query.dtype, call.query.device)


def _band_mask(band: WindowCall, rows: int) -> Tensor:
    """Part of the mask [L, S] that all bands of so many rows share, with 0 for any text keys in front."""
    reached, columns = band.radius - 1, band.query.shape[2]
    whole = Geometry(rows, rows + 2 * reached, columns, 0, band.radius, row_offset=reached, square=band.square)
    first = reached - band.row_offset
    keys = slice(first * columns, (first + band.key.shape[1]) * columns)
    mask_LS = bias(whole, band.query.dtype, band.query.device)[: band.query.shape[1] * columns, keys]
    return pad(mask_LS, (band.key_text.shape[1], 0)) if band.key_text.shape[1] else mask_LS


@lru_cache(maxsize=MASKS_KEPT)
def bias(geometry: Geometry, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Bias of the scores, [L, S]: 0 where a query sees a key, else -inf."""
    row, column = torch.arange(geometry.rows, device=device), torch.arange(geometry.columns, device=device)
    down_RE = row[:, None] + geometry.row_offset - torch.arange(geometry.key_rows, device=device)
    across_WW = column[:, None] - column
    squared = down_RE.square()[:, None, :, None], across_WW.square()[None, :, None, :]
    hidden_RWEW = squared_distance(*squared, geometry.square) >= geometry.radius**2
    keys = geometry.text + geometry.key_rows * geometry.columns
    bias_LS = torch.zeros(geometry.rows * geometry.columns, keys + -keys % BIAS_ALIGNMENT, dtype=dtype, device=device)
    bias_LS = bias_LS[:, :keys]
    bias_LS[:, geometry.text :].masked_fill_(hidden_RWEW.flatten(0, 1).flatten(1, 2), -torch.inf)
    return bias_LS


def why_not(shape: CallShape) -> str | None:
    if not shape.dtype.is_floating_point:
        return f"it takes floating-point numbers only, got {shape.dtype}"
    mask_bytes = most_in_mask(shape) * shape.dtype.itemsize
    if mask_bytes > MOST_MASK_BYTES:
        return f"its mask would take {mask_bytes / 2**20:.0f} MiB, at most {MOST_MASK_BYTES / 2**20:.0f}"
    return None


def most_in_mask(shape: CallShape) -> int:
    """Elements of the largest mask."""
    rows = band_rows(shape) if shape.device_type == "cpu" else shape.rows
    if shape.rows <= rows:
        return shape.queries * shape.keys
    return rows * shape.columns * (shape.text + (rows + 2 * shape.radius - 2) * shape.columns)


BACKEND = Backend("masked", why_not, run)
