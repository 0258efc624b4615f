"""The blocks that the compiled kernel visits, which the uncompiled one ignores; and which kernel it is."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from clear_dist.attention import flex, flex_mask, reference, window_attention
from clear_dist.attention.backend import CallShape, Geometry
from clear_dist.attention.flex_mask import BLOCK, TILE_COLUMNS, block_mask
from tests.attention.calls import Case

CPU = torch.device("cpu")


def dense(geometry: Geometry, query_rows: int, mask: BlockMask) -> Tensor:
    """The mask [tiles of queries, blocks of keys, tokens of a tile, BLOCK] from its definition alone."""
    queries, keys = mask.seq_lengths
    sees = flex_mask.mask_of(geometry, query_rows)(None, None, torch.arange(queries)[:, None], torch.arange(keys))
    return sees.unflatten(0, (-1, query_rows * TILE_COLUMNS)).unflatten(2, (-1, BLOCK)).transpose(1, 2)


def listed(counts: Tensor, indices: Tensor, blocks: int) -> Tensor:
    """Bool [tiles, blocks]: the blocks in a table; each at most once."""
    chosen = torch.zeros(counts.shape[-1], blocks, dtype=torch.int32)
    for tile, (count, row) in enumerate(zip(counts[0, 0].tolist(), indices[0, 0], strict=True)):
        chosen[tile].scatter_add_(0, row[:count].long(), torch.ones(count, dtype=torch.int32))
    assert chosen.max() <= 1
    return chosen.bool()


def blocks_suffice(geometry: Geometry, query_rows: int) -> None:
    """Every visible key lies in a listed block, and blocks listed as whole hold visible keys only."""
    mask = block_mask(geometry, CPU, query_rows)
    sees = dense(geometry, query_rows, mask)
    partial = listed(mask.kv_num_blocks, mask.kv_indices, sees.shape[1])
    whole = listed(mask.full_kv_num_blocks, mask.full_kv_indices, sees.shape[1])
    assert not (partial & whole).any()
    assert sees[whole].all()
    # Queries that fill up a border tile are thrown away; what only they see need not be visited.
    image = torch.ones(1, geometry.rows, geometry.columns, 1, 1)
    tokens = flex._tokens(torch.ones(1, 0, 1, 1), image, query_rows)
    real = tokens.flatten().bool().unflatten(0, (-1, query_rows * TILE_COLUMNS))
    assert not (sees & real[:, None, :, None]).any(dim=(-1, -2))[~(partial | whole)].any()


@pytest.mark.parametrize("row_offset", range(9))
@pytest.mark.parametrize("radius", [7, 8, 9])
@pytest.mark.parametrize("query_rows", flex.FLASH_ROWS.values())
def test_blocks_suffice_wherever_the_queries_start(row_offset: int, radius: int, query_rows: int) -> None:
    """Tiles of queries and tiles of keys need not line up; a window then touches one tile more."""
    blocks_suffice(Geometry(24, 48, columns=40, text=5, radius=radius, row_offset=row_offset + 8), query_rows)


@given(data=st.data())
@settings(max_examples=25)
def test_blocks_suffice_for_any_geometry(data: st.DataObject) -> None:
    geometry = Geometry(
        rows=data.draw(st.integers(1, 30)),
        key_rows=data.draw(st.integers(1, 60)),
        columns=data.draw(st.integers(1, 60)),
        text=data.draw(st.sampled_from([0, 1, 127, 128, 200, 256])),
        radius=data.draw(st.integers(1, 40)),
        row_offset=data.draw(st.integers(-60, 60)),
    )
    blocks_suffice(geometry, data.draw(st.sampled_from([8, 16])))


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


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (8, 16), (13, 40), (30, 5), (16, 32)])
@pytest.mark.parametrize("tile_rows", [8, 16])
@pytest.mark.parametrize("text", [0, 5, 128])
def test_tile_order_and_back(rows: int, columns: int, tile_rows: int, text: int) -> None:
    text_BTND, image = torch.randn(2, text, 3, 4), torch.randn(2, rows, columns, 3, 4)
    tokens = flex._tokens(text_BTND, image, tile_rows)
    first = -(-text // BLOCK) * BLOCK
    assert tokens.shape[1] == first + -(-rows // tile_rows) * tile_rows * -(-columns // 16) * 16
    assert torch.equal(tokens[:, :text], text_BTND)
    assert torch.equal(flex._in_raster_order(tokens[:, first:], rows, columns, tile_rows), image)
    assert tokens.abs().sum() == pytest.approx((text_BTND.abs().sum() + image.abs().sum()).item(), rel=1e-5)
    y, x = rows - 1, columns - 1
    tile = y // tile_rows * -(-columns // 16) + x // 16
    place = first + tile * tile_rows * 16 + y % tile_rows * 16 + x % 16
    assert torch.equal(tokens[:, place], image[:, y, x])


@pytest.mark.parametrize("query_rows", flex.FLASH_ROWS.values())
def test_tall_tiles_of_queries_compute_the_same(query_rows: int) -> None:
    case = Case(rows=21, key_rows=40, columns=37, text=9, radius=9, row_offset=11)
    calls = []
    probe = replace(flex.BACKEND, run=lambda call: (calls.append(call), reference.BACKEND.run(call))[1])
    query, *keys = case.tensors()
    expected = window_attention(query, *keys, radius=9, row_offset=11, backend=probe)
    torch.testing.assert_close(flex.run(calls[0], query_rows=query_rows), expected, atol=1e-5, rtol=1e-5)


@pytest.fixture
def with_flash(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretend Hopper, FlashAttention 4 and a torch that is new enough."""
    monkeypatch.setattr(flex, "find_spec", lambda _: object())
    monkeypatch.setattr(flex, "capability", lambda: 9)
    monkeypatch.setattr(torch, "__version__", "2.13.0+cu130")


@pytest.mark.usefixtures("with_flash")
def test_flash_is_for_hopper_and_blackwell(monkeypatch: pytest.MonkeyPatch) -> None:
    request = CallShape("cuda", torch.bfloat16, head_dim=128)
    assert flex.lacks_flash(request) is None
    monkeypatch.setattr(flex, "capability", lambda: 10)
    assert flex.lacks_flash(request) is None
    monkeypatch.setattr(flex, "capability", lambda: 8)
    assert "compute capability 9 or 10, got 8" in (flex.lacks_flash(request) or "")


@pytest.mark.usefixtures("with_flash")
@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        (CallShape("cpu", torch.bfloat16), "it runs on cuda, got cpu"),
        (CallShape("cuda", torch.float32), "it takes bfloat16 and float16, got torch.float32"),
        (CallShape("cuda", torch.bfloat16, head_dim=256), "it takes heads of 64, 96, 128, got 256"),
    ],
)
def test_flash_says_what_it_cannot_do(request_: CallShape, reason: str) -> None:
    assert flex.why_not_flash(request_) == reason


@pytest.mark.usefixtures("with_flash")
def test_flash_needs_its_package_and_a_torch_with_the_right_log_sum_exp(monkeypatch: pytest.MonkeyPatch) -> None:
    request = CallShape("cuda", torch.bfloat16, head_dim=128)
    monkeypatch.setattr(torch, "__version__", "2.12.1+cu130")
    assert flex.lacks_flash(request) == "it needs torch 2.13 or newer, got 2.12.1+cu130"
    monkeypatch.setattr(torch, "__version__", "2.13.0")
    monkeypatch.setattr(flex, "find_spec", lambda name: None if name == "flash_attn.cute" else object())
    assert "flash-attn-4 is not installed (pip install --pre flash-attn-4)" in (flex.lacks_flash(request) or "")


@pytest.mark.usefixtures("with_flash")
@pytest.mark.parametrize(("capability", "blocks"), [(9, (128, 128)), (10, (256, 128))])
def test_flash_is_asked_of_flex_attention_in_its_own_blocks(
    monkeypatch: pytest.MonkeyPatch, capability: int, blocks: tuple[int, int]
) -> None:
    """FlashAttention 4 takes blocks of 128 x 128 on Hopper and of 256 x 128 on Blackwell."""
    asked: dict = {}
    monkeypatch.setattr(flex, "capability", lambda: capability)
    monkeypatch.setattr(flex, "run", lambda call, **options: asked.update(options))
    flex.run_flash(None)
    assert asked["kernel_options"] == {"BACKEND": "FLASH"}
    geometry = Geometry(40, 40, columns=40, text=5, radius=9, row_offset=0)
    mask = block_mask(geometry, CPU, asked["query_rows"])
    assert tuple(mask.BLOCK_SIZE) == blocks
    assert mask.full_kv_num_blocks is not None
