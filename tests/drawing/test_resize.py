"""Rows of a resized picture are those of Pillow's whole one, whatever part of it a rank holds."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from clear_dist.drawing.resize import resize_rows, rows_behind
from clear_dist.geometry import Rows, cut_in_stripes

SIDES = st.integers(1, 50)
Size = tuple[int, int]


def picture(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height * 1009 + width).integers(0, 256, (height, width, 3), dtype=np.uint8)


def whole(pixels: np.ndarray, new_size: Size) -> np.ndarray:
    """Pillow alone; where a side shrinks it would not always begin with the columns."""
    image, (height, width) = Image.fromarray(pixels), new_size
    if height < image.height or width < image.width:
        image = image.resize((width, image.height))
    return np.asarray(image.resize((width, height)))


def resized(pixels: np.ndarray, new_size: Size, rows: Rows, *, more: int = 0) -> np.ndarray:
    """Rows made of the rows behind them and of nothing else; of `more` on either side, where they exist."""
    size = pixels.shape[0], pixels.shape[1]
    behind = rows_behind(rows, size[0], new_size[0])
    held = Rows(max(0, behind.start - more), min(size[0], behind.stop + more))
    part = torch.from_numpy(pixels[held.start : held.stop].copy()).permute(2, 0, 1)
    both = resize_rows(
        torch.stack([part, 255 - part]), held.start, size=size, new_size=new_size, rows=rows
    )  # two pictures
    assert both.shape == (2, 3, len(rows), new_size[1]) and both.dtype == torch.uint8
    assert len(rows) < 2 or not torch.equal(both[0], both[1])
    return both[0].permute(1, 2, 0).numpy()


@given(SIDES, SIDES, SIDES, SIDES, st.data())
def test_any_rows_at_any_ratio_are_the_whole_pictures(
    height: int, width: int, new_height: int, new_width: int, data: st.DataObject
) -> None:
    start = data.draw(st.integers(0, new_height - 1))
    rows = Rows(start, data.draw(st.integers(start + 1, new_height)))
    pixels, new_size = picture(height, width), (new_height, new_width)
    found = resized(pixels, new_size, rows, more=data.draw(st.integers(0, 3)))
    assert np.array_equal(found, whole(pixels, new_size)[rows.start : rows.stop])


@given(SIDES, SIDES, st.data())
def test_rows_behind_are_hardly_more_than_those_that_count(height: int, new_height: int, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, new_height - 1))
    rows = Rows(start, data.draw(st.integers(start + 1, new_height)))
    behind, scale = rows_behind(rows, height, new_height), height / new_height
    assert 0 <= behind.start < behind.stop <= height
    assert len(behind) <= (len(rows) - 1) * scale + 4 * max(1, scale) + 2


def test_no_rows_are_made_of_none() -> None:
    assert rows_behind(Rows(5, 5), 10, 20) == Rows(0, 0)


@pytest.mark.parametrize(("height", "new_height"), [(4096, 8192), (4080, 8192), (2731, 8192), (8192, 3001)])
def test_high_pictures_are_equal_too(height: int, new_height: int) -> None:
    """Where float32 would know a row's position to a thousandth only."""
    pixels, new_size = picture(height, 3), (new_height, 5)
    stripes = [resized(pixels, new_size, rows) for rows in cut_in_stripes(new_height, 3)]
    assert np.array_equal(np.concatenate(stripes), whole(pixels, new_size))


def test_rows_that_are_missing_are_not_made_up() -> None:
    with pytest.raises(AssertionError, match=r"of 5 rows"):
        resize_rows(torch.zeros(1, 3, 5, 4, dtype=torch.uint8), 3, size=(20, 4), new_size=(40, 8), rows=Rows(9, 20))
