"""What the Triton kernel promises beyond being right; `test_triton.py` runs this file in Triton's interpreter."""

from itertools import cycle

import pytest
import torch

from clear_dist.attention import BACKENDS, extend_attention, triton_window
from tests.attention.calls import Case

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


@pytest.mark.parametrize(
    ("head_dim", "dtype"), list(zip(triton_window.HEAD_DIMS, cycle(TOLERANCE), strict=False)), ids=str
)
def test_triton_takes_all_heads_and_dtypes(head_dim: int, dtype: torch.dtype) -> None:
    case = Case(rows=9, key_rows=9, columns=17, text=5, radius=3, heads=1, head_dim=head_dim, dtype=dtype)
    tensors = case.tensors()
    expected = case.run("reference", tuple(tensor.float() for tensor in tensors))
    out, lse = case.run("triton", tensors)
    torch.testing.assert_close((out.float(), lse), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize(
    ("radius", "tile"), [(1, (0, 0)), (2, (3, 1)), (8, (3, 1)), (9, (6, 2)), (16, (0, 0)), (16, (6, 2))], ids=str
)
def test_triton_reads_only_tiles_that_the_circle_touches(radius: int, tile: tuple[int, int]) -> None:
    """Values that no query of a tile can see, nor share a tile of keys with one that it sees, are NaN."""
    tiling = triton_window.choose_tiling(64, torch.float32, 0)
    (rows, columns), (key_rows, key_columns) = tiling.queries, tiling.keys
    top, left = tile[0] * rows, tile[1] * columns
    case = Case(rows=rows, key_rows=56, columns=48, text=3, radius=radius, row_offset=top, heads=1, head_dim=64)
    query, key, value, *text = case.tensors()
    expected, _ = case.run("reference", (query, key, value, *text))
    y, x = torch.arange(56)[:, None], torch.arange(48)
    nearest_y = torch.maximum(top - y, y - top - rows + 1).clamp(min=0)
    nearest_x = torch.maximum(left - x, x - left - columns + 1).clamp(min=0)
    seen = nearest_y**2 + nearest_x**2 < radius**2
    read = seen.unflatten(1, (-1, key_columns)).unflatten(0, (-1, key_rows)).any(3, keepdim=True).any(1, keepdim=True)
    unread = ~read.expand(-1, key_rows, -1, key_columns).reshape(56, 48)
    assert unread.any()
    value[:, unread] = torch.nan
    out, _ = case.run("triton", (query, key, value, *text))
    mine = slice(left, left + columns)
    torch.testing.assert_close(out[:, :, mine], expected[:, :, mine], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("key_bytes", "radius"), list(zip((128, 256, 512, 1024, 2048), (20, 18, 14, 10, 8), strict=True))
)
def test_triton_masks_nothing_but_what_is_outside(key_bytes: int, radius: int) -> None:
    """Equal scores: a query's output is the mean of the values that it sees; some tiles of keys are seen as a whole."""
    case = Case(rows=4, key_rows=32, columns=23, text=0, radius=radius, row_offset=14, heads=1, head_dim=key_bytes // 8)
    query, key, value, *text = case.tensors()
    y, x = torch.meshgrid(torch.arange(32), torch.arange(23), indexing="ij")
    out, lse = case.run("triton", (torch.zeros_like(query), key, value, *text))
    for row, column in ((0, 0), (3, 2), (2, 12), (1, 22)):
        seen = (y - row - 14) ** 2 + (x - column) ** 2 < radius**2
        assert float(lse[0, row, column, 0].exp()) == pytest.approx(int(seen.sum()), rel=1e-5)
        torch.testing.assert_close(out[0, row, column], value[0, seen].mean(0), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("rows", "radius", "dtype"),
    [(9, 5, torch.float32), (3, 8, torch.float32), (20, 16, torch.bfloat16), (11, 2, torch.float16)],
    ids=str,
)
def test_triton_extends_attention_to_keys_of_halos(rows: int, radius: int, dtype: torch.dtype) -> None:
    """A stripe's own keys, then those above and below, into the same strided output: attention to all of them."""
    halo = radius - 1
    case = Case(rows=rows, key_rows=rows + 2 * halo, columns=19, text=5, radius=radius, row_offset=halo, dtype=dtype)
    query, key, value, *text = tensors = case.tensors()
    room = torch.full((1, rows, 2, 16, 21), torch.nan, dtype=dtype)
    out = room.permute(0, 1, 4, 2, 3)[:, :, 1:-1]
    own = slice(halo, halo + rows)
    _, lse = case.run("triton", (query, key[:, own], value[:, own], *text), row_offset=0, out_BRWND=out)
    no_text = [tensor[:, :0] for tensor in text]
    for start, stop in ((0, halo), (halo + rows, None)):
        keys = key[:, start:stop], value[:, start:stop]
        options = {"radius": radius, "row_offset": halo - start, "backend": BACKENDS["triton"]}
        extend_attention(query, *keys, *no_text, **options, out_BRWND=out, lse_BRWN=lse)
    expected = case.run("reference", tuple(tensor.float() for tensor in tensors))
    torch.testing.assert_close((out.float(), lse), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    assert room[..., [0, -1]].isnan().all()


def test_triton_extends_attention_to_nothing() -> None:
    """Queries that have seen no key hold NaN; rows that see none of the new keys keep it."""
    case = Case(rows=30, key_rows=9, columns=12, text=0, radius=4, row_offset=-11, scale=0.3)
    tensors = case.tensors()
    out = torch.full_like(tensors[0], torch.nan)
    lse = torch.full(out.shape[:-1], -torch.inf)
    options = {"radius": 4, "row_offset": -11, "scale": 0.3, "backend": BACKENDS["triton"]}
    extend_attention(*tensors, **options, out_BRWND=out, lse_BRWN=lse)
    expected_out, expected_lse = case.run("reference", tensors)
    assert expected_lse.isneginf().any()
    expected_out[expected_lse.isneginf()] = torch.nan
    torch.testing.assert_close((out, lse), (expected_out, expected_lse), atol=1e-5, rtol=1e-5, equal_nan=True)
    with pytest.raises(ValueError, match="log-sum-exp must be float32"):
        extend_attention(*tensors, **options, out_BRWND=out, lse_BRWN=lse.double())


def test_triton_extends_attention_by_text() -> None:
    case = Case(rows=6, key_rows=6, columns=9, text=40, radius=3)
    query, key, value, *text = case.tensors()
    out, lse = case.run("triton", (query, key, value, *(tensor[:, :7] for tensor in text)))
    rest = query, key[:, :0], value[:, :0], *(tensor[:, 7:] for tensor in text)
    extend_attention(*rest, radius=3, row_offset=0, backend=BACKENDS["triton"], out_BRWND=out, lse_BRWN=lse)
    expected = case.run("reference", (query, key, value, *text))
    torch.testing.assert_close((out, lse), expected, atol=1e-5, rtol=1e-5)
