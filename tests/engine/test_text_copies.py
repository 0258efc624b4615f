"""Which copies of a text there are, and which of them a rank holds."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clear_dist.comm.text_reduce import Average, Exact
from clear_dist.engine.text_copies import Copies
from clear_dist.geometry import Rows, bands_of, cut_in_stripes, touched


@given(st.integers(1, 300), st.integers(1, 70))
def test_bands_are_as_many_as_in_the_official_code(tokens: int, side: int) -> None:
    bands = bands_of(tokens, side)
    assert len(bands) == max(1, tokens // side)
    for token in range(tokens):
        (band,) = (number for number, each in enumerate(bands) if token in each.numbers)
        assert band == min(token // side, len(bands) - 1)
    assert bands_of(tokens, None) == (Rows(0, tokens),)


@given(st.integers(1, 60), st.integers(1, 20), st.data())
def test_a_stripe_touches_the_bands_of_its_rows(rows: int, side: int, data: st.DataObject) -> None:
    bands = bands_of(rows, side)
    for stripe in cut_in_stripes(rows, data.draw(st.integers(1, rows))):
        held = {number for number, band in enumerate(bands) if set(band.numbers) & set(stripe.numbers)}
        assert set(touched(bands, stripe).numbers) == held


@pytest.mark.parametrize("reduction", [Average(), Exact()])
def test_a_rank_holds_the_copies_of_its_rows_blocks(reduction: Average | Exact) -> None:
    """8 x 9 tokens on 3 ranks: two bands of 4 rows, the second rank's rows in both; 4 and 5 columns."""
    stripes = cut_in_stripes(8, 3)
    first, second, third = (Copies.of(stripes, 9, rank, 4, reduction, is_apart=True) for rank in range(3))
    assert [len(each.blocks) for each in (first, second, third)] == [2, 4, 2]
    assert [block.columns for block in second.blocks] == [Rows(0, 4), Rows(4, 9)] * 2
    assert [block.rows for block in second.blocks] == [Rows(0, 4)] * 2 + [Rows(4, 8)] * 2
    assert {each.most for each in (first, second, third)} == {4}
    counting = [[block.counts_text_keys for block in each.blocks] for each in (first, second, third)]
    exact = [[True] * 2, [False, False, True, True], [False] * 2]
    assert counting == (exact if isinstance(reduction, Exact) else [[True] * 2, [True] * 4, [True] * 2])
    assert second.plan(5, 1).counts == (20,)


def test_all_see_all_copies_with_full_attention() -> None:
    stripes = cut_in_stripes(8, 3)
    for rank in range(3):
        copies = Copies.of(stripes, 9, rank, 4, Exact(), is_apart=False)
        assert len(copies.blocks) == copies.most == 4 and not copies.is_apart


def test_a_single_block_has_the_text_itself() -> None:
    for side in (None, 5):
        copies = Copies.of(cut_in_stripes(8, 3), 9, 1, side, Exact(), is_apart=True)
        assert len(copies.blocks) == copies.most == 1 and not copies.is_apart
