"""The blocks that the compiled kernel visits, which the uncompiled one ignores."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from clear_dist.attention import flex
from clear_dist.attention.flex import BLOCK, Geometry, block_mask

CPU = torch.device("cpu")


def dense(geometry: Geometry, mask: BlockMask) -> Tensor:
    """The mask [tiles of queries, blocks of keys, BLOCK, BLOCK] from its definition alone."""
    queries, keys = mask.seq_lengths
    sees = flex.mask_of(geometry)(None, None, torch.arange(queries)[:, None], torch.arange(keys))
    return sees.unflatten(0, (-1, BLOCK)).unflatten(2, (-1, BLOCK)).transpose(1, 2)


def listed(counts: Tensor, indices: Tensor, blocks: int) -> Tensor:
    """Bool [tiles, blocks]: the blocks in a table; each at most once."""
    chosen = torch.zeros(counts.shape[-1], blocks, dtype=torch.int32)
    for tile, (count, row) in enumerate(zip(counts[0, 0].tolist(), indices[0, 0], strict=True)):
        chosen[tile].scatter_add_(0, row[:count].long(), torch.ones(count, dtype=torch.int32))
    assert chosen.max() <= 1
    return chosen.bool()


def blocks_suffice(geometry: Geometry) -> None:
    """Every visible key lies in a listed block, and blocks listed as whole hold visible keys only."""
    mask = block_mask(geometry, CPU)
    sees = dense(geometry, mask)
    partial = listed(mask.kv_num_blocks, mask.kv_indices, sees.shape[1])
    whole = listed(mask.full_kv_num_blocks, mask.full_kv_indices, sees.shape[1])
    assert not (partial & whole).any()
    assert sees[whole].all()
    # Queries that fill up a border tile are thrown away; what only they see need not be visited.
    image = torch.ones(1, geometry.rows, geometry.columns, 1, 1)
    real = flex._in_tile_order(image).flatten().bool().unflatten(0, (-1, BLOCK))
    assert not (sees & real[:, None, :, None]).any(dim=(-1, -2))[~(partial | whole)].any()


@pytest.mark.parametrize("row_offset", range(9))
@pytest.mark.parametrize("radius", [7, 8, 9])
def test_blocks_suffice_wherever_the_queries_start(row_offset: int, radius: int) -> None:
    """Tiles of queries and tiles of keys need not line up; a window then touches one tile more."""
    blocks_suffice(Geometry(rows=24, key_rows=48, columns=40, text=5, radius=radius, row_offset=row_offset + 8))


@given(data=st.data())
@settings(deadline=None, max_examples=25)
def test_blocks_suffice_for_any_geometry(data: st.DataObject) -> None:
    geometry = Geometry(
        rows=data.draw(st.integers(1, 30)),
        key_rows=data.draw(st.integers(1, 60)),
        columns=data.draw(st.integers(1, 60)),
        text=data.draw(st.sampled_from([0, 1, 127, 128, 200, 256])),
        radius=data.draw(st.integers(1, 40)),
        row_offset=data.draw(st.integers(-60, 60)),
    )
    blocks_suffice(geometry)


def test_few_blocks_are_visited_and_listed() -> None:
    """Wanted / visited pairs of image tokens for 8x16 tiles: 0.419 at radius 16 far from the border."""
    geometry = Geometry(rows=512, key_rows=512, columns=512, text=0, radius=16, row_offset=0)
    mask = block_mask(geometry, CPU)
    visited = (mask.kv_num_blocks + mask.full_kv_num_blocks).sum().item() * BLOCK**2
    offset = torch.arange(-15, 16)
    circle = ((offset[:, None] ** 2 + offset**2) < 256).sum().item()
    assert visited == pytest.approx(512 * 512 * circle / 0.419, rel=0.05)
    assert mask.kv_indices.shape[-1] <= 32


def test_masks_are_kept_with_their_geometry() -> None:
    geometry = Geometry(rows=20, key_rows=26, columns=20, text=5, radius=4, row_offset=3)
    same = Geometry(rows=20, key_rows=26, columns=20, text=5, radius=4, row_offset=3)
    other = Geometry(rows=20, key_rows=26, columns=20, text=5, radius=4, row_offset=2)
    assert block_mask(geometry, CPU) is block_mask(same, CPU)
    assert block_mask(geometry, CPU) is not block_mask(other, CPU)


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (8, 16), (13, 40), (30, 5)])
def test_tile_order_and_back(rows: int, columns: int) -> None:
    image = torch.randn(2, rows, columns, 3, 4)
    tokens = flex._in_tile_order(image)
    assert tokens.shape[1] % BLOCK == 0
    assert torch.equal(flex._in_raster_order(tokens, rows, columns), image)
