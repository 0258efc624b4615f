"""FlexAttention's mask for a circle: which blocks of keys each tile of queries visits, and what it sees there.

Tokens come in tiles of 8x16, so that a block of 128 is compact in the image; text keys come first, padded to whole
blocks. The lists have as many entries as there are visits, never blocks x blocks.

Shape suffixes: P tiles of queries, K blocks of keys that one tile of queries may visit.
"""

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from torch.nn.functional import pad

from clear_dist.attention.backend import Geometry, squared_distance

TILE_ROWS, TILE_COLUMNS = 8, 16
BLOCK = TILE_ROWS * TILE_COLUMNS
"""FlexAttention's own block size."""
GEOMETRIES_KEPT = 16
"""Own rows and two halos for each stage of a cascade, and room for more."""


@lru_cache(maxsize=GEOMETRIES_KEPT)
def block_mask(
    geometry: Geometry, device: torch.device, query_rows: int = TILE_ROWS, *, trains: bool = False
) -> BlockMask:
    """Blocks of keys that each tile of queries (of `query_rows`) visits, and which of them need no mask.

    With `trains` also the tiles of queries that visit each block, for which lists must have a place for every block.
    """
    visited, distance, farthest = _image_blocks(geometry, query_rows)
    tiles, text_blocks = visited.shape[0], tiles_in(geometry.text, BLOCK)
    text = torch.arange(text_blocks).expand(tiles, -1)
    blocks = torch.cat([text, visited + text_blocks], dim=1)
    # A text block is whole unless it is the last and padded.
    padded_text = text >= geometry.text // BLOCK
    reach = geometry.radius**2
    partial = torch.cat([padded_text, (distance < reach) & (farthest >= reach)], dim=1)
    whole = torch.cat([~padded_text, farthest < reach], dim=1)
    query_block = query_rows * TILE_COLUMNS
    image_blocks = tiles_in(geometry.key_rows, TILE_ROWS) * tiles_in(geometry.columns, TILE_COLUMNS)
    if trains:
        padding = 0, text_blocks + image_blocks - blocks.shape[1]
        blocks, partial, whole = pad(blocks, padding), pad(partial, padding), pad(whole, padding)
    partial_count, partial_blocks = _table(blocks, partial, device)
    whole_count, whole_blocks = _table(blocks, whole, device)
    return BlockMask.from_kv_blocks(
        partial_count,
        partial_blocks,
        whole_count,
        whole_blocks,
        BLOCK_SIZE=(query_block, BLOCK),
        mask_mod=mask_of(geometry, query_rows),
        seq_lengths=(tiles * query_block, (text_blocks + image_blocks) * BLOCK),
        compute_q_blocks=trains,
    )


def tiles_in(tokens: int, size: int) -> int:
    return -(-tokens // size)


def mask_of(geometry: Geometry, query_rows: int = TILE_ROWS) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """FlexAttention's `mask_mod`, on positions in tile order."""
    first_image_key, tiles_across = tiles_in(geometry.text, BLOCK) * BLOCK, tiles_in(geometry.columns, TILE_COLUMNS)

    def position(token: Tensor, tile_rows: int) -> tuple[Tensor, Tensor]:
        tile, within = token // (tile_rows * TILE_COLUMNS), token % (tile_rows * TILE_COLUMNS)
        row = tile // tiles_across * tile_rows + within // TILE_COLUMNS
        return row, tile % tiles_across * TILE_COLUMNS + within % TILE_COLUMNS

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        row, column = position(query, query_rows)
        key_row, key_column = position(key - first_image_key, TILE_ROWS)
        down, across = row + geometry.row_offset - key_row, column - key_column
        in_window = squared_distance(down * down, across * across, geometry.square) < geometry.radius**2
        in_image = (key_row < geometry.key_rows) & (key_column < geometry.columns)
        return torch.where(key < first_image_key, key < geometry.text, in_window & in_image)

    return sees


def _image_blocks(geometry: Geometry, query_rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Near tiles of keys; squared distances of nearest and farthest (padded: out of reach) tokens: int64 [P, K]."""
    row_tile, row_near, row_far = _neighbours(
        geometry.rows, geometry.row_offset, geometry.key_rows, (query_rows, TILE_ROWS), geometry.radius
    )
    column_tile, column_near, column_far = _neighbours(
        geometry.columns, 0, geometry.columns, (TILE_COLUMNS, TILE_COLUMNS), geometry.radius
    )

    def all_pairs(rows: Tensor, columns: Tensor, joined: Callable[..., Tensor]) -> Tensor:
        return joined(rows[:, None, :, None], columns[None, :, None, :]).flatten(2, 3).flatten(0, 1)

    def squared(down: Tensor, across: Tensor) -> Tensor:
        return squared_distance(down.square(), across.square(), geometry.square)

    tile = all_pairs(row_tile * tiles_in(geometry.columns, TILE_COLUMNS), column_tile, torch.add)
    return tile, all_pairs(row_near, column_near, squared), all_pairs(row_far, column_far, squared)


def _neighbours(
    queries: int, offset: int, keys: int, sides: tuple[int, int], radius: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Tiles of keys along one dimension; distances of their nearest and farthest tokens: int64 [P, K] each.

    A tile that does not exist is `radius` away, as is the farthest token of a padded one; `sides` are lengths of both.
    """
    query_side, side = sides
    first_query = torch.arange(0, queries, query_side)[:, None] + offset
    first_tile = (first_query - radius + 1).clamp(min=0) // side
    # The most tiles that a stretch of query_side + 2 * (radius - 1) tokens can touch, wherever it starts.
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
    """FlexAttention's (number of blocks [1, 1, P], indices [1, 1, P, K]) in int32, the chosen blocks first."""
    order = chosen_PK.to(torch.int8).argsort(dim=1, descending=True, stable=True)
    # What follows the chosen ones is never visited, but must be a block that exists.
    indices = blocks_PK.gather(1, order).masked_fill(~chosen_PK.gather(1, order), 0)
    return chosen_PK.sum(1).int()[None, None].to(device), indices.int()[None, None].to(device)
