"""What tiles promise beyond being right: how they are cut."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from clear_dist.attention import tiled
from clear_dist.attention.backend import WindowCall
from tests.attention.calls import Case

NAMES = ("query", "key", "value", "key_text", "value_text")


@pytest.mark.parametrize("side", [1, 3, 8, 16, 64])
@pytest.mark.parametrize("bytes_per_call", [1, 2**17, 2**30])
def test_any_tiling_gives_the_same(side: int, bytes_per_call: int) -> None:
    case = Case(rows=19, key_rows=33, columns=26, text=5, radius=4, row_offset=7, batch=2)
    tensors = case.tensors()
    call = WindowCall(**dict(zip(NAMES, tensors, strict=True)), radius=4, row_offset=7, scale=0.25)
    results = tiled.run_in(call, tiled.Tiling(side, bytes_per_call))
    torch.testing.assert_close(results, case.run("reference", tensors), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("text_apart", [1, 5, 6])
@pytest.mark.parametrize(("key_rows", "row_offset"), [(19, 0), (19, 9), (33, 0), (33, 40), (19, -19)])
@pytest.mark.parametrize("factor", [1, 30])
def test_text_in_a_call_of_its_own_gives_the_same(text_apart: int, key_rows: int, row_offset: int, factor: int) -> None:
    """Also where a query sees no image key, and where the text or the image has nearly all of the weight."""
    case = Case(rows=19, key_rows=key_rows, columns=26, text=5, radius=4, row_offset=row_offset, batch=2)
    query, *others = case.tensors()
    tensors = (query * factor, *others)
    call = WindowCall(**dict(zip(NAMES, tensors, strict=True)), radius=4, row_offset=row_offset, scale=0.25)
    results = tiled.run_in(call, tiled.Tiling(8, 2**17, text_apart))
    torch.testing.assert_close(results, case.run("reference", tensors), atol=1e-5, rtol=1e-5)


@given(st.integers(1, 90), st.integers(-90, 90), st.integers(0, 90), st.integers(1, 20), st.integers(1, 40))
def test_spans_cover_queries_once_and_hold_their_windows(
    queries: int, offset: int, keys: int, side: int, radius: int
) -> None:
    covered = []
    for span in tiled.cut_in_spans(queries, offset, keys, side, radius):
        for tile in range(span.tiles):
            start, first = span.starts_at(tile, side)
            tile_queries = range(start, start + span.query_length)
            covered += tile_queries
            wanted = [key for key in range(keys) if any(abs(key - query - offset) < radius for query in tile_queries)]
            assert list(range(first, first + span.key_length)) == wanted or not (wanted or span.key_length)
            assert not wanted or start + offset == first + span.lead
    assert covered == list(range(queries))


def test_interior_tiles_are_of_one_kind() -> None:
    spans = tiled.cut_in_spans(512, 0, 512, 8, 16)
    assert [span.tiles for span in spans] == [1, 1, 60, 1, 1]
