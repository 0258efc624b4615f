"""Windowed attention on 2D tiles of queries with PyTorch's own attention: runs anywhere, without a compiler.

The rectangle of keys that a tile's circles reach is gathered behind the text keys and attended to under a mask; tiles
cut off alike by the border share the mask and one call. Work and memory per token are constant. A long text may have a
call of its own, without a mask, and be merged with the tiles.

Shape suffixes: B batch, R rows of queries, E rows of keys, W columns, N heads, T text tokens, D head dim;
Y rows of tiles, X columns of tiles, H rows and V columns of one tile or of its rectangle of keys, S keys of a tile.
"""

import sys
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import product

import torch
from torch import Tensor
from torch.nn.functional import pad

from clear_dist.attention.apart import with_text_apart
from clear_dist.attention.backend import Backend, CallShape, WindowCall, squared_distance
from clear_dist.attention.dense import BIAS_ALIGNMENT, fused, heads_last
from clear_dist.geometry import half_widths


@dataclass(frozen=True)
class Tiling:
    side: int
    """Rows and columns of a tile of queries: small tiles gather fewer masked keys, large ones copy less."""
    bytes_per_call: int
    """Limit of the gathered K and V of one call, which has one tile at least."""
    text_apart: int = sys.maxsize
    """Text tokens from which they have a call of their own."""


# A GPU wants larger calls, and copies of the keys cost it more than the products that are masked.
GPU_TILING = Tiling(side=16, bytes_per_call=256 * 2**20)


@dataclass(frozen=True)
class Span:
    """Tiles along one dimension that are cut off alike; the i-th lies i * side further on."""

    query_start: int
    query_length: int
    key_start: int
    key_length: int
    lead: int
    tiles: int = 1

    def starts_at(self, tile: int, side: int) -> tuple[int, int]:
        return self.query_start + tile * side, self.key_start + tile * side


def cpu_tiling(radius: int) -> Tiling:
    """The fastest on 2 cores by `benchmarks/speed/tiles.py`; 8 MiB stay in the cache."""
    return Tiling(side=8 if radius < 16 else 16, bytes_per_call=8 * 2**20, text_apart=128)


def run(call: WindowCall) -> tuple[Tensor, Tensor]:
    """Windowed attention for inference only: autograd refuses buffers that are reused."""
    return run_on_cpu(call) if call.query.device.type == "cpu" else run_in(call, GPU_TILING)


def run_on_cpu(call: WindowCall) -> tuple[Tensor, Tensor]:
    return run_in(call, cpu_tiling(call.radius))


def run_in(call: WindowCall, tiling: Tiling) -> tuple[Tensor, Tensor]:
    in_tiles = partial(_in_tiles, tiling=tiling)
    is_apart = call.key_text.shape[1] >= tiling.text_apart and call.sees_itself
    return with_text_apart(call, in_tiles) if is_apart else in_tiles(call)


def _in_tiles(call: WindowCall, tiling: Tiling) -> tuple[Tensor, Tensor]:
    out_BRWND = call.query.new_empty(call.query.shape) if call.out is None else call.out
    lse_BRWN1 = call.query.new_empty((*call.query.shape[:-1], 1), dtype=torch.float32)
    rows, columns = call.query.shape[1:3]
    row_spans = cut_in_spans(rows, call.row_offset, call.key.shape[1], tiling.side, call.radius)
    bias = window_bias(call.radius, call.square, tiling.side, call.query.dtype, call.query.device)
    for row_span in row_spans:
        across = call.radius if call.square else radius_across(row_span, call.radius)
        for column_span in cut_in_spans(columns, 0, columns, tiling.side, across):
            _attend_alike(call, (out_BRWND, lse_BRWN1), bias, row_span, column_span, tiling)
    return out_BRWND, lse_BRWN1.squeeze(-1)


def cut_in_spans(queries: int, offset: int, keys: int, side: int, radius: int) -> list[Span]:
    """Tiles of `side` along one dimension, those cut off alike joined; query i is key i + offset."""
    spans: list[Span] = []
    for start in range(0, queries, side):
        length = min(side, queries - start)
        first = max(0, start + offset - radius + 1)
        stop = min(keys, start + offset + length + radius - 1)
        if first < stop:
            span = Span(start, length, first, stop - first, lead=start + offset - first)
        else:
            span = Span(start, length, key_start=0, key_length=0, lead=0)
        if spans and (span.query_length, span.key_length, span.lead) == (
            spans[-1].query_length,
            spans[-1].key_length,
            spans[-1].lead,
        ):
            last = spans.pop()
            span = Span(last.query_start, length, last.key_start, last.key_length, last.lead, last.tiles + 1)
        spans.append(span)
    return spans


def radius_across(row_span: Span, radius: int) -> int:
    """Radius across that circles have left in a span's rows of keys; less where all these lie above or below it."""
    distance = max(row_span.lead - row_span.key_length + 1, -row_span.lead - row_span.query_length + 1, 0)
    return half_widths(radius)[distance] + 1 if row_span.key_length else 1


@lru_cache(maxsize=4)
def window_bias(radius: int, square: bool, side: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Bias [side, side, side + 2 * radius - 2, same], row and column of query, then of key: 0 inside, -inf outside."""
    reach = radius - 1
    query = torch.arange(side, device=device) + reach
    key = torch.arange(side + 2 * reach, device=device)
    squared = (query[:, None] - key).square()
    hidden = squared_distance(squared[:, None, :, None], squared[None, :, None, :], square) >= radius**2
    return torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, -torch.inf)


def _attend_alike(
    call: WindowCall,
    results: tuple[Tensor, Tensor],
    bias: Tensor,
    row_span: Span,
    column_span: Span,
    tiling: Tiling,
) -> None:
    """Fill `results` ([B, R, W, N, D] and [B, R, W, N, 1]) for tiles cut off alike, a bufferful at a time."""
    mask = _mask(call, bias, row_span, column_span)
    query_size = row_span.query_length, column_span.query_length
    key_size = row_span.key_length, column_span.key_length
    keys_BYXSND, values_BYXSND = _buffers(call, row_span, column_span, tiling)
    down, across = keys_BYXSND.shape[1:3]
    for y, x in product(range(0, row_span.tiles, down), range(0, column_span.tiles, across)):
        tiles = min(down, row_span.tiles - y), min(across, column_span.tiles - x)
        (row, key_row), (column, key_column) = row_span.starts_at(y, tiling.side), column_span.starts_at(x, tiling.side)
        key_tiles = _tiles(call.key, (key_row, key_column), tiles, key_size, tiling.side)
        value_tiles = _tiles(call.value, (key_row, key_column), tiles, key_size, tiling.side)
        query_tiles = _tiles(call.query, (row, column), tiles, query_size, tiling.side)
        out, lse = heads_last(
            *fused(
                query_tiles.flatten(3, 4).flatten(0, 2).transpose(1, 2),
                _behind_text(keys_BYXSND, key_tiles),
                _behind_text(values_BYXSND, value_tiles),
                call.scale,
                mask,
            )
        )
        for result, computed in zip(results, (out, lse), strict=True):
            result_tiles = _tiles(result, (row, column), tiles, query_size, tiling.side)
            result_tiles.copy_(computed.reshape(result_tiles.shape))
        if call.query.is_meta:
            return  # the other buffersful take the same


def _buffers(call: WindowCall, row_span: Span, column_span: Span, tiling: Tiling) -> tuple[Tensor, Tensor]:
    """Buffers [B, Y, X, S, N, D] for keys and values of several tiles, the text tokens already in place."""
    batch, text, heads, head_dim = call.key_text.shape
    length = text + row_span.key_length * column_span.key_length
    bytes_per_tile = 2 * batch * length * heads * head_dim * call.key.element_size()
    tiles = max(1, tiling.bytes_per_call // bytes_per_tile)
    across = min(column_span.tiles, tiles)
    down = min(row_span.tiles, max(1, tiles // across))
    shape = batch, down, across, heads, length, head_dim  # oneDNN wants a head's keys side by side
    keys, values = (call.key.new_empty(shape).transpose(3, 4) for _ in range(2))
    keys[:, :, :, :text] = call.key_text[:, None, None]
    values[:, :, :, :text] = call.value_text[:, None, None]
    return keys, values


def _behind_text(buffer_BYXSND: Tensor, tiles_BYXHVND: Tensor) -> Tensor:
    """Copy tiles behind the text of a buffer; returns the view [B * Y * X, N, S, D] of what is filled."""
    down, across, rows, columns = tiles_BYXHVND.shape[1:5]
    filled = buffer_BYXSND[:, :down, :across]
    filled[:, :, :, filled.shape[3] - rows * columns :].unflatten(3, (rows, columns)).copy_(tiles_BYXHVND)
    return filled.flatten(0, 2).transpose(1, 2)


def _mask(call: WindowCall, bias: Tensor, row_span: Span, column_span: Span) -> Tensor:
    """Part of `bias` for tiles of this kind, [queries, T + keys], with 0 for the text keys in front."""
    above, left = call.radius - 1 - row_span.lead, call.radius - 1 - column_span.lead
    part = bias[
        : row_span.query_length,
        : column_span.query_length,
        above : above + row_span.key_length,
        left : left + column_span.key_length,
    ]
    keys = call.key_text.shape[1] + row_span.key_length * column_span.key_length
    mask = pad(part.flatten(0, 1).flatten(1, 2), (call.key_text.shape[1], -keys % BIAS_ALIGNMENT))
    return mask[:, :keys]


def _tiles(image: Tensor, start: tuple[int, int], tiles: tuple[int, int], size: tuple[int, int], side: int) -> Tensor:
    """Overlapping rectangles, `side` tokens apart, of an image [B, rows, columns, N, D]: view [B, Y, X, H, V, N, D]."""
    batch, row, column, head, dim = image.stride()
    return image.as_strided(
        (image.shape[0], *tiles, *size, *image.shape[3:]),
        (batch, row * side, column * side, row, column, head, dim),
        image.storage_offset() + start[0] * row + start[1] * column,
    )


def why_not(shape: CallShape) -> str | None:
    return None if shape.dtype.is_floating_point else f"it takes floating-point numbers only, got {shape.dtype}"


BACKEND = Backend("tiled", why_not, run, automatic_on=("cpu", "cuda", "mps", "xpu"))
