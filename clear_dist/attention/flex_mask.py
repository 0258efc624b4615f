"""FlexAttention's mask for a circle: which blocks of keys each tile of queries visits, and what it sees there.

Tokens are ordered by tiles of 8x16, so that a block of 128 is compact in the image. The text keys come first, padded to
whole blocks. Which blocks a tile visits is worked out from distances between tiles: as many entries as blocks are
visited, never blocks x blocks.

Shape suffixes: P tiles of queries, K blocks of keys that one tile of queries may visit.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

TILE_ROWS, TILE_COLUMNS = 8, 16
BLOCK = TILE_ROWS * TILE_COLUMNS
"""Tokens of a tile: FlexAttention's own block size."""
GEOMETRIES_KEPT = 16
"""Own rows and two halos for each stage of a cascade, and room for more."""


@dataclass(frozen=True)
class Geometry:
    """Everything that the mask depends on, in tokens."""

    rows: int
    key_rows: int
    columns: int
    text: int
    radius: int
    row_offset: int
    query_rows: int = TILE_ROWS
    """Of a tile of queries; tiles of keys have TILE_ROWS."""

    @property
    def query_block(self) -> int:
        """Tokens of a tile of queries."""
        return self.query_rows * TILE_COLUMNS

    @property
    def text_blocks(self) -> int:
        """Blocks in front that hold the text keys, the last one padded."""
        return -(-self.text // BLOCK)

    @property
    def tiles_across(self) -> int:
        """Tiles in one row of tiles."""
        return -(-self.columns // TILE_COLUMNS)


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
    query_length = tiles * geometry.query_block
    key_length = (geometry.text_blocks + -(-geometry.key_rows // TILE_ROWS) * geometry.tiles_across) * BLOCK
    partial_count, partial_blocks = _table(blocks, partial, device)
    whole_count, whole_blocks = _table(blocks, whole, device)
    return BlockMask.from_kv_blocks(
        partial_count,
        partial_blocks,
        whole_count,
        whole_blocks,
        BLOCK_SIZE=(geometry.query_block, BLOCK),
        mask_mod=mask_of(geometry),
        seq_lengths=(query_length, key_length),
        compute_q_blocks=False,
    )


def mask_of(geometry: Geometry) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """FlexAttention's `mask_mod`: whether a query sees a key, from their positions in tile order."""
    first_image_key, tiles_across = geometry.text_blocks * BLOCK, geometry.tiles_across

    def position(token: Tensor, tile_rows: int) -> tuple[Tensor, Tensor]:
        tile, within = token // (tile_rows * TILE_COLUMNS), token % (tile_rows * TILE_COLUMNS)
        row = tile // tiles_across * tile_rows + within // TILE_COLUMNS
        return row, tile % tiles_across * TILE_COLUMNS + within % TILE_COLUMNS

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        row, column = position(query, geometry.query_rows)
        key_row, key_column = position(key - first_image_key, TILE_ROWS)
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
        geometry.rows, geometry.row_offset, geometry.key_rows, (geometry.query_rows, TILE_ROWS), geometry.radius
    )
    column_tile, column_near, column_far = _neighbours(
        geometry.columns, 0, geometry.columns, (TILE_COLUMNS, TILE_COLUMNS), geometry.radius
    )

    def all_pairs(rows: Tensor, columns: Tensor) -> Tensor:
        return (rows[:, None, :, None] + columns[None, :, None, :]).flatten(2, 3).flatten(0, 1)

    tile = all_pairs(row_tile * geometry.tiles_across, column_tile)
    return tile, all_pairs(row_near.square(), column_near.square()), all_pairs(row_far.square(), column_far.square())


def _neighbours(
    queries: int, offset: int, keys: int, sides: tuple[int, int], radius: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Along one dimension, for each tile of queries [P] the tiles of keys [K] that it may reach.

    Args:
        sides: of a tile of queries and of a tile of keys.

    Returns:
        Three int64 tensors [P, K]: the tile of keys; the distance between the nearest tokens; between the farthest.
        A tile that does not exist is `radius` away; one that is filled up has its farthest token `radius` away.
    """
    query_side, side = sides
    first_query = torch.arange(0, queries, query_side)[:, None] + offset
    first_tile = (first_query - radius + 1).clamp(min=0) // side
    # So many tiles can a stretch of query_side + 2 * (radius - 1) tokens touch, wherever it starts.
    span = min(-(-keys // side), (query_side + side + 2 * radius - 4) // side + 1)
    tile = first_tile + torch.arange(span)
    ahead = tile * side - first_query
    nearest = torch.maximum(ahead - query_side + 1, 1 - ahead - side).clamp(min=0)
    farthest = torch.maximum(ahead + side - 1, query_side - 1 - ahead)
    return (
        tile,
        nearest.masked_fill(tile * side >= keys, radius),
        farthest.masked_fill((tile + 1) * side > keys, radius),
    )


def _table(blocks_PK: Tensor, chosen_PK: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """FlexAttention's (number of blocks [1, 1, P], their indices [1, 1, P, K]) in int32: the chosen ones in front."""
    order = chosen_PK.to(torch.int8).argsort(dim=1, descending=True, stable=True)
    # What follows the chosen ones is never visited, but must be a block that exists.
    indices = blocks_PK.gather(1, order).masked_fill(~chosen_PK.gather(1, order), 0)
    return chosen_PK.sum(1).int()[None, None].to(device), indices.int()[None, None].to(device)
