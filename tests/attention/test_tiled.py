"""What tiles promise beyond being right: what they read, and how much they hold."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from clear_dist.attention import tiled
from clear_dist.attention.backend import WindowCall
from tests.attention.calls import Case


@pytest.mark.parametrize("row_offset", [0, 9, 20, 29])
def test_rows_out_of_reach_are_not_read(row_offset: int) -> None:
    case = Case(rows=11, key_rows=40, columns=13, text=4, radius=6, row_offset=row_offset)
    query, key, value, *text = case.tensors()
    expected = case.run("reference", (query, key, value, *text))
    unread = torch.ones(40, dtype=torch.bool)
    unread[max(0, row_offset - 5) : row_offset + 11 + 5] = False
    assert unread.any()
    for tensor in (key, value):
        tensor[:, unread] = torch.nan
    torch.testing.assert_close(case.run("tiled", (query, key, value, *text)), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("side", [1, 3, 8, 16, 64])
@pytest.mark.parametrize("bytes_per_call", [1, 2**17, 2**30])
def test_any_tiling_gives_the_same(side: int, bytes_per_call: int) -> None:
    case = Case(rows=19, key_rows=33, columns=26, text=5, radius=4, row_offset=7, batch=2)
    tensors = case.tensors()
    names = ("query", "key", "value", "key_text", "value_text")
    call = WindowCall(**dict(zip(names, tensors, strict=True)), radius=4, row_offset=7, scale=0.25)
    out = tiled.run(call, tiled.Tiling(side, bytes_per_call))
    torch.testing.assert_close(out, case.run("reference", tensors), atol=1e-5, rtol=1e-5)


@given(st.integers(1, 90), st.integers(0, 30), st.integers(0, 30), st.integers(1, 20), st.integers(1, 40))
def test_spans_cover_queries_once_and_hold_their_windows(
    queries: int, before: int, after: int, side: int, radius: int
) -> None:
    keys = before + queries + after
    covered = []
    for span in tiled.cut_in_spans(queries, before, keys, side, radius):
        for tile in range(span.tiles):
            start, first = span.starts_at(tile, side)
            covered += range(start, start + span.query_length)
            assert start + before == first + span.lead
            assert first == max(0, start + before - radius + 1)
            assert first + span.key_length == min(keys, start + before + span.query_length + radius - 1)
    assert covered == list(range(queries))


def test_interior_tiles_are_of_one_kind() -> None:
    spans = tiled.cut_in_spans(512, 0, 512, 8, 16)
    assert [span.tiles for span in spans] == [1, 1, 60, 1, 1]
