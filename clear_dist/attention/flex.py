"""Windowed attention with PyTorch's FlexAttention: one compiled kernel that visits only blocks the circle touches.

Tokens are ordered by tiles of 8x16, so that a block of 128 is compact in the image and few blocks are visited. The text
keys come first, padded to whole blocks. Which blocks a tile visits is worked out from distances between tiles: as many
entries as blocks are visited, never blocks x blocks.

Shape suffixes: B batch, R rows of queries, E rows of keys, W columns, N heads, T text tokens, D head dim,
L queries and S keys in tile order, P tiles of queries, K blocks of keys that one tile of queries may visit.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxOutput, AuxRequest, BlockMask, flex_attention
from torch.nn.functional import pad

from clear_dist.attention.backend import Backend, Request, WindowCall, why_too_many_scores

TILE_ROWS, TILE_COLUMNS = 8, 16
BLOCK = TILE_ROWS * TILE_COLUMNS
"""Tokens of a tile: FlexAttention's own block size."""

GEOMETRIES_KEPT = 16
"""Own rows and two halos for each stage of a cascade, and room for more."""

SHAPES_COMPILED = 64
"""Dynamo's own limit of 8 is less than a cascade needs, and beyond it the scores would be held all at once."""


@dataclass(frozen=True)
class Geometry:
    """Everything that the mask depends on, in tokens."""

    rows: int
    key_rows: int
    columns: int
    text: int
    radius: int
    row_offset: int

    @property
    def text_blocks(self) -> int:
        """Blocks in front that hold the text keys, the last one padded."""
        return -(-self.text // BLOCK)

    @property
    def tiles_across(self) -> int:
        """Tiles in one row of tiles."""
        return -(-self.columns // TILE_COLUMNS)


def run(call: WindowCall) -> tuple[Tensor, Tensor]:
    """Windowed attention (out, lse)."""
    geometry = Geometry(
        rows=call.query.shape[1],
        key_rows=call.key.shape[1],
        columns=call.query.shape[2],
        text=call.key_text.shape[1],
        radius=call.radius,
        row_offset=call.row_offset,
    )
    device = call.query.device
    attention = _compiled() if device.type == "cuda" else _unfused
    with torch._dynamo.config.patch(recompile_limit=SHAPES_COMPILED):
        out_BNLD, aux = attention(
            _in_tile_order(call.query).transpose(1, 2),
            _keys(call.key_text, call.key).transpose(1, 2),
            _keys(call.value_text, call.value).transpose(1, 2),
            block_mask=block_mask(geometry, device),
            scale=call.scale,
            return_aux=AuxRequest(lse=True),
        )
    assert aux.lse is not None
    results = out_BNLD.transpose(1, 2), aux.lse.transpose(1, 2).unsqueeze(-1)
    out_BRWND, lse_BRWN1 = (_in_raster_order(result, geometry.rows, geometry.columns) for result in results)
    return out_BRWND, lse_BRWN1.squeeze(-1).float()


@lru_cache(maxsize=1)
def _compiled() -> Callable[..., tuple[Tensor, AuxOutput]]:
    """FlexAttention compiled: once per shape, shared by all layers. It fails rather than fall back to all scores."""
    return torch.compile(flex_attention, dynamic=False, fullgraph=True)


def _unfused(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> tuple[Tensor, AuxOutput]:
    """FlexAttention uncompiled, without its warning that it holds all scores: `why_not` limits their size."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
        return flex_attention(query, key, value, **options)


def _in_tile_order(image: Tensor) -> Tensor:
    """[B, rows, columns, N, D] -> [B, tokens, N, D]: tile after tile, the border tiles filled up with zeros."""
    batch, rows, columns, heads, head_dim = image.shape
    padded = pad(image, (0, 0, 0, 0, 0, -columns % TILE_COLUMNS, 0, -rows % TILE_ROWS))
    tiles = padded.unflatten(2, (-1, TILE_COLUMNS)).unflatten(1, (-1, TILE_ROWS)).transpose(2, 3)
    return tiles.reshape(batch, -1, heads, head_dim)


def _in_raster_order(tokens: Tensor, rows: int, columns: int) -> Tensor:
    """The inverse of `_in_tile_order`: [B, tokens, N, D] -> [B, rows, columns, N, D]."""
    down, across = -(-rows // TILE_ROWS), -(-columns // TILE_COLUMNS)
    tiles = tokens.unflatten(1, (down, across, TILE_ROWS, TILE_COLUMNS)).transpose(2, 3)
    return tiles.flatten(3, 4).flatten(1, 2)[:, :rows, :columns].contiguous()


def _keys(text_BTND: Tensor, image_BEWND: Tensor) -> Tensor:
    """[B, S, N, D]: the text filled up to whole blocks, then the image in tile order."""
    padded = pad(text_BTND, (0, 0, 0, 0, 0, -text_BTND.shape[1] % BLOCK))
    return torch.cat([padded, _in_tile_order(image_BEWND)], dim=1)


@lru_cache(maxsize=GEOMETRIES_KEPT)
def block_mask(geometry: Geometry, device: torch.device) -> BlockMask:
    """Which blocks of keys each tile of queries visits, and which of them need no mask. Kept with its geometry."""
    visited, distance, farthest = _image_blocks(geometry)
    tiles = visited.shape[0]
    text = torch.arange(geometry.text_blocks).expand(tiles, -1)
    blocks = torch.cat([text, visited + geometry.text_blocks], dim=1)
    # A text block is whole unless it is the last and padded.
    padded_text = text >= geometry.text // BLOCK
    reach = geometry.radius**2
    partial = torch.cat([padded_text, (distance < reach) & (farthest >= reach)], dim=1)
    whole = torch.cat([~padded_text, farthest < reach], dim=1)
    query_length = tiles * BLOCK
    key_length = (geometry.text_blocks + -(-geometry.key_rows // TILE_ROWS) * geometry.tiles_across) * BLOCK
    partial_count, partial_blocks = _table(blocks, partial, device)
    whole_count, whole_blocks = _table(blocks, whole, device)
    return BlockMask.from_kv_blocks(
        partial_count,
        partial_blocks,
        whole_count,
        whole_blocks,
        BLOCK_SIZE=BLOCK,
        mask_mod=mask_of(geometry),
        seq_lengths=(query_length, key_length),
        compute_q_blocks=False,
    )


def mask_of(geometry: Geometry) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """FlexAttention's `mask_mod`: whether a query sees a key, from their positions in tile order."""
    first_image_key, tiles_across = geometry.text_blocks * BLOCK, geometry.tiles_across

    def position(token: Tensor) -> tuple[Tensor, Tensor]:
        tile, within = token // BLOCK, token % BLOCK
        row = tile // tiles_across * TILE_ROWS + within // TILE_COLUMNS
        return row, tile % tiles_across * TILE_COLUMNS + within % TILE_COLUMNS

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        row, column = position(query)
        key_row, key_column = position(key - first_image_key)
        down, across = row + geometry.row_offset - key_row, column - key_column
        in_circle = down * down + across * across < geometry.radius**2
        in_image = (key_row < geometry.key_rows) & (key_column < geometry.columns)
        return torch.where(key < first_image_key, key < geometry.text, in_circle & in_image)

    return sees


def _image_blocks(geometry: Geometry) -> tuple[Tensor, Tensor, Tensor]:
    """For each tile of queries the tiles of keys near it, and how near they are.

    Returns:
        Three int64 tensors [P, K]: the tile of keys; the squared distance between the nearest tokens of both tiles;
        that between the farthest, which is out of reach if the tile of keys is filled up or doesn't exist.
    """
    row_tile, row_near, row_far = _neighbours(
        geometry.rows, geometry.row_offset, geometry.key_rows, TILE_ROWS, geometry.radius
    )
    column_tile, column_near, column_far = _neighbours(
        geometry.columns, 0, geometry.columns, TILE_COLUMNS, geometry.radius
    )

    def all_pairs(rows: Tensor, columns: Tensor) -> Tensor:
        return (rows[:, None, :, None] + columns[None, :, None, :]).flatten(2, 3).flatten(0, 1)

    tile = all_pairs(row_tile * geometry.tiles_across, column_tile)
    return tile, all_pairs(row_near.square(), column_near.square()), all_pairs(row_far.square(), column_far.square())


def _neighbours(queries: int, offset: int, keys: int, side: int, radius: int) -> tuple[Tensor, Tensor, Tensor]:
    """Along one dimension, for each tile of queries [P] the tiles of keys [K] that it may reach.

    Returns:
        Three int64 tensors [P, K]: the tile of keys; the distance between the nearest tokens; between the farthest.
        A tile that does not exist is `radius` away; one that is filled up has its farthest token `radius` away.
    """
    first_query = torch.arange(0, queries, side)[:, None] + offset
    first_tile = (first_query - radius + 1).clamp(min=0) // side
    # So many tiles can a stretch of side + 2 * (radius - 1) tokens touch, wherever it starts.
    span = min(-(-keys // side), 2 * (side + radius - 2) // side + 1)
    tile = first_tile + torch.arange(span)
    ahead = tile * side - first_query
    nearest = (ahead.abs() - side + 1).clamp(min=0).masked_fill(tile * side >= keys, radius)
    farthest = (ahead.abs() + side - 1).masked_fill((tile + 1) * side > keys, radius)
    return tile, nearest, farthest


def _table(blocks_PK: Tensor, chosen_PK: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """FlexAttention's (number of blocks [1, 1, P], their indices [1, 1, P, K]) in int32: the chosen ones in front."""
    order = chosen_PK.to(torch.int8).argsort(dim=1, descending=True, stable=True)
    # What follows the chosen ones is never visited, but must be a block that exists.
    indices = blocks_PK.gather(1, order).masked_fill(~chosen_PK.gather(1, order), 0)
    return chosen_PK.sum(1).int()[None, None].to(device), indices.int()[None, None].to(device)


def why_not(request: Request) -> str | None:
    """It needs a GPU and Triton; on the CPU it holds all scores and serves for tests."""
    if request.device_type == "cpu":
        return why_too_many_scores(request)
    if request.device_type != "cuda":
        return f"it runs on cuda, and for tests on cpu, got {request.device_type}"
    if find_spec("triton") is None:
        return "its compiler, the package triton, is not installed"
    if request.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"it takes float32, bfloat16 and float16, got {request.dtype}"
    return f"it takes heads of 16 and more, got {request.head_dim}" if 0 < request.head_dim < 16 else None


BACKEND = Backend("flex", why_not, run, automatic_on=("cuda",))
