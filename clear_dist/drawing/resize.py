"""Bicubic interpolation of some rows of a picture in bytes: Pillow's, as in CLEAR's notebook, as of the whole picture.

Shapes: B pictures, C channels, E low rows behind mine, R my high rows, W columns of the low picture.
"""

from math import ceil, floor

import numpy as np
import torch
from PIL.Image import Resampling, fromarray
from torch import Tensor

from clear_dist.geometry import Rows

SUPPORT = 2
"""Rows on either side of a position that count, where a picture grows; more in proportion where it shrinks."""


def rows_behind(rows: Rows, height: int, new_height: int) -> Rows:
    """Rows of a picture of `height` that determine `rows` of it at `new_height`; none for none."""
    if not len(rows):
        return Rows(0, 0)
    scale = height / new_height
    reach = SUPPORT * max(1.0, scale)
    first, last = (rows.start + 0.5) * scale - reach, (rows.stop - 0.5) * scale + reach
    return Rows(max(0, floor(first)), min(height, ceil(last)))


def resize_rows(
    pixels_BCEW: Tensor, first_row: int, *, size: tuple[int, int], new_size: tuple[int, int], rows: Rows
) -> Tensor:
    """`rows` of the whole picture at its new size, bytes [B, C, R, new width]; a rare value is off by one.

    Args:
        pixels_BCEW: at least the rows `rows_behind(rows, ...)`, from `first_row` on, as bytes.
        size, new_size: height and width of the whole picture before and after.
    """
    behind = rows_behind(rows, size[0], new_size[0])
    batch, channels, held, width = pixels_BCEW.shape
    assert width == size[1], f"{width} columns of a picture of {size}"
    assert first_row <= behind.start < behind.stop <= first_row + held, f"{behind} of {held} rows"
    resized = pixels_BCEW.new_empty(batch, channels, len(rows), new_size[1])
    top, bottom = (row * size[0] / new_size[0] - first_row for row in (rows.start, rows.stop))
    for picture, low_CEW in zip(resized, pixels_BCEW, strict=True):
        low = fromarray(low_CEW.permute(1, 2, 0).contiguous().cpu().numpy())
        # Columns first, as Pillow does where both sides grow: for a few rows alone it would begin with those.
        wide = low.resize((new_size[1], held), Resampling.BICUBIC)
        high = wide.resize((new_size[1], len(rows)), Resampling.BICUBIC, box=(0, top, new_size[1], bottom))
        picture.copy_(torch.from_numpy(np.array(high)).permute(2, 0, 1))
    return resized
