"""Interpolated rows are those of the whole picture's interpolation, whatever part of it a rank holds."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from clear_dist.drawing.resize import resize_rows, rows_behind
from clear_dist.geometry import Rows, cut_in_stripes

SIDES = st.integers(1, 50)
Size = tuple[int, int]


def picture(height: int, width: int, *, batch: int = 1) -> torch.Tensor:
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(height * 1009 + width)) * 2 - 1


def interpolated(pixels: torch.Tensor, new_size: Size) -> torch.Tensor:
    return F.interpolate(pixels, new_size, mode="bicubic", align_corners=False)


def resized(pixels: torch.Tensor, new_size: Size, rows: Rows, *, more: int = 0, **kwargs: int) -> torch.Tensor:
    """Rows made of the rows behind them and of nothing else; of `more` on either side, where they exist."""
    size = (pixels.shape[2], pixels.shape[3])
    behind = rows_behind(rows, size[0], new_size[0])
    held = Rows(max(0, behind.start - more), min(size[0], behind.stop + more))
    part = pixels[:, :, held.start : held.stop].clone()
    return resize_rows(part, held.start, size=size, new_size=new_size, rows=rows, **kwargs)


@settings(deadline=None)
@given(SIDES, SIDES, SIDES, SIDES, st.data())
def test_any_rows_at_any_ratio_are_the_whole_pictures(
    height: int, width: int, new_height: int, new_width: int, data: st.DataObject
) -> None:
    rows = Rows(*sorted((data.draw(st.integers(0, new_height)), data.draw(st.integers(0, new_height)))))
    more, max_bytes = data.draw(st.integers(0, 3)), data.draw(st.sampled_from([1, 5_000, 1 << 20]))
    pixels, new_size = picture(height, width, batch=2), (new_height, new_width)
    found = resized(pixels, new_size, rows, more=more, max_bytes=max_bytes)
    expected = interpolated(pixels, new_size)[:, :, rows.start : rows.stop]
    assert found.shape == expected.shape
    assert len(rows) == 0 or (found - expected).abs().max() <= 1e-5


@settings(deadline=None)
@given(SIDES, SIDES, st.data())
def test_rows_behind_are_those_that_count_and_no_others(height: int, new_height: int, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, new_height - 1))
    rows = Rows(start, data.draw(st.integers(start + 1, new_height)))
    behind = rows_behind(rows, height, new_height)
    # Each low row in a channel of its own: where a channel is not zero its row counts.
    responses = interpolated(torch.eye(height).view(1, height, height, 1), (new_height, 1))[
        0, :, rows.start : rows.stop, 0
    ]
    counting = responses.abs().amax(dim=1).gt(1e-4).nonzero().flatten().tolist()
    assert set(counting) <= set(range(behind.start, behind.stop))
    assert 0 <= behind.start < behind.stop <= height
    # A tap at a whole distance has no weight.
    assert len(behind) <= (len(rows) - 1) * height / new_height + 5


def test_no_rows_are_made_of_none() -> None:
    assert rows_behind(Rows(5, 5), 10, 20) == Rows(0, 0)
    assert resized(picture(10, 4), (20, 8), Rows(5, 5)).shape == (1, 3, 0, 8)


@pytest.mark.parametrize(("height", "new_height"), [(4096, 8192), (4080, 8192), (2731, 8192), (8192, 3001)])
def test_high_pictures_are_equal_too(height: int, new_height: int) -> None:
    """Where float32 knows a row's position to a thousandth only."""
    pixels, new_size = picture(height, 3), (new_height, 5)
    stripes = [resized(pixels, new_size, rows) for rows in cut_in_stripes(new_height, 3)]
    assert (torch.cat(stripes, dim=2) - interpolated(pixels, new_size)).abs().max() <= 1e-5


@pytest.mark.parametrize("ranks", [2, 3, 5])
def test_stripes_do_not_depend_on_how_many_there_are(ranks: int) -> None:
    pixels, new_size = picture(20, 14), (48, 32)
    stripes = [resized(pixels, new_size, rows, max_bytes=10_000) for rows in cut_in_stripes(48, ranks)]
    alone = resized(pixels, new_size, Rows(0, 48))
    assert (torch.cat(stripes, dim=2) - alone).abs().max() <= 1e-6


def test_bfloat16_is_computed_in_float32() -> None:
    pixels, rows = picture(9, 7).bfloat16(), Rows(3, 15)
    found = resized(pixels, (20, 16), rows)
    exact = interpolated(pixels.float(), (20, 16))[:, :, 3:15]
    assert found.dtype == torch.bfloat16
    # Half a step of bfloat16, and a little for a tie that falls the other way.
    assert (found.float() - exact).abs().le(exact.abs() * 2**-8 + 1e-5).all()


class Largest(TorchDispatchMode):
    """The most bytes that an operation inside has returned in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and not result._is_view() and result.dtype == torch.float32:
            self.nbytes = max(self.nbytes, result.nbytes)
        return result


@pytest.mark.parametrize("new_size", [(1024, 64), (300, 20)])
def test_temporary_tensors_are_small(new_size: Size) -> None:
    pixels = picture(512, 32).bfloat16()
    with Largest() as largest:
        resized(pixels, new_size, Rows(0, new_size[0]), max_bytes=50_000)
    assert 1_000 < largest.nbytes <= 25_000


def test_rows_that_are_missing_are_not_made_up() -> None:
    with pytest.raises(AssertionError, match=r"Rows\(start=3, stop=9\) of 5 rows"):
        resize_rows(picture(5, 4), 3, size=(20, 4), new_size=(40, 8), rows=Rows(9, 14))
