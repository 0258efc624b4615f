"""By rows or by columns: which of them an image is cut into, against counts made pair by pair."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clear_dist.geometry import Rows, Striping, most_stripes, stripe_image

SIDES = st.integers(1, 24)


def sent(lines: list[range], width: int, radius: int | None) -> int:
    """Tokens in lines that any other rank's queries see, once for each such rank."""
    everywhere = [line for stripe in lines for line in stripe]
    seen = [
        {line for line in everywhere for own in stripe if radius is None or abs(line - own) < radius} - set(stripe)
        for stripe in lines
    ]
    return width * sum(map(len, seen))


@given(SIDES, SIDES, st.integers(1, 3), st.none() | st.integers(1, 30), st.data())
def test_auto_sends_fewest(rows: int, columns: int, unit: int, radius: int | None, data: st.DataObject) -> None:
    size = rows * unit, columns * unit
    ranks = data.draw(st.integers(1, max(rows, columns)))
    costs = {}
    for lines, (along, across) in {"rows": size, "columns": size[::-1]}.items():
        if ranks * unit <= along:
            image = stripe_image(size, ranks, cut=lines, radius=radius, unit=unit)
            assert (image.lines == lines or ranks == 1) and image.stripes[0].start == 0
            assert [len(stripe) % unit for stripe in image.stripes] == [0] * ranks
            if image.lines == lines:
                assert (image.width, image.stripes[-1].stop) == (across, along)
                stripes = [range(stripe.start, stripe.stop) for stripe in image.stripes]
                costs[lines] = sent(stripes, across, radius), across * max(map(len, stripes))
    chosen = stripe_image(size, ranks, cut="auto", radius=radius, unit=unit)
    assert chosen.lines == min(costs, key=lambda lines: costs[lines])
    assert ranks <= rows * unit or chosen.lines == "columns"


@pytest.mark.parametrize(
    ("size", "ranks", "radius", "lines"),
    [
        ((64, 1024), 8, 16, "columns"),
        ((1024, 64), 8, 16, "rows"),
        ((64, 64), 8, 16, "rows"),
        ((64, 1024), 1, 16, "rows"),
        ((64, 128), 8, None, "rows"),
        ((64, 128), 3, None, "columns"),
    ],
)
def test_a_square_one_rank_and_equal_bytes_are_rows(
    size: tuple[int, int], ranks: int, radius: int | None, lines: str
) -> None:
    """With full attention all send all; what is joined is as long as the longest stripe, 22 of 64 or 43 of 128."""
    assert stripe_image(size, ranks, cut="auto", radius=radius).lines == lines


def test_columns_are_rows_of_the_transposed_image() -> None:
    found = stripe_image((3, 10), 4, cut="auto", radius=2)
    assert found == Striping(True, (Rows(0, 3), Rows(3, 6), Rows(6, 8), Rows(8, 10)), 3)


@pytest.mark.parametrize(
    ("size", "ranks", "cut", "unit", "message"),
    [
        ((4, 9), 10, "auto", 1, "9 columns of tokens can be cut for 1 to 9 ranks, got 10; nearest: 9"),
        ((9, 4), 10, "auto", 1, "9 rows of tokens can be cut for 1 to 9 ranks, got 10; nearest: 9"),
        ((4, 9), 5, "rows", 1, "4 rows of tokens can be cut for 1 to 4 ranks, got 5; nearest: 4"),
        ((9, 4), 5, "columns", 1, "4 columns of tokens can be cut for 1 to 4 ranks, got 5; nearest: 4"),
        ((8, 6), 1, "rows", 4, "the width in tokens must be a multiple of 4, got 6; nearest: 8"),
        ((6, 8), 1, "columns", 4, "the height in tokens must be a multiple of 4, got 6; nearest: 8"),
    ],
)
def test_what_cannot_be_cut_is_refused(size: tuple[int, int], ranks: int, cut: str, unit: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        stripe_image(size, ranks, cut=cut, radius=2, unit=unit)


def test_a_picture_s_vae_needs_a_row_for_each_rank() -> None:
    assert [most_stripes((8, 40), cut=cut) for cut in ("auto", "rows", "columns")] == [8, 8, 8]
    assert [most_stripes((8, 40), cut=cut, unit=4) for cut in ("auto", "rows", "columns")] == [8, 2, 8]
    assert [most_stripes((40, 8), cut=cut, unit=4) for cut in ("auto", "rows", "columns")] == [10, 10, 2]
