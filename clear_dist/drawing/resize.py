"""Bicubic interpolation of some rows of a picture in bytes: Pillow's, as in CLEAR's notebook, as of the whole picture.

Shapes: B pictures, C channels, E low rows behind mine, R my high rows, W columns of the low picture.
"""

from math import ceil, copysign, floor

import numpy as np
import torch
from PIL.Image import Resampling, fromarray
from torch import Tensor

from clear_dist.geometry import Rows

SUPPORT = 2
"""Rows on either side of a position that count, where a picture grows; more in proportion where it shrinks."""
PRECISION = 22
"""Bits of the fixed point that Pillow's weights are rounded to."""


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
    """`rows` of the whole picture at its new size, bytes [B, C, R, new width], equal to the bit.

    Args:
        pixels_BCEW: at least the rows `rows_behind(rows, ...)`, from `first_row` on, as bytes.
        size, new_size: height and width of the whole picture before and after.
    """
    behind = rows_behind(rows, size[0], new_size[0])
    batch, channels, held, width = pixels_BCEW.shape
    assert width == size[1], f"{width} columns of a picture of {size}"
    assert first_row <= behind.start < behind.stop <= first_row + held, f"{behind} of {held} rows"
    resized = pixels_BCEW.new_empty(batch, channels, len(rows), new_size[1])
    for picture, low_CEW in zip(resized, pixels_BCEW, strict=True):
        low = fromarray(low_CEW.permute(1, 2, 0).contiguous().cpu().numpy())
        # Columns first, as Pillow does where both sides grow: for a few rows alone it would begin with those.
        wide = np.asarray(low.resize((new_size[1], held), Resampling.BICUBIC))
        # Not by its `box`, whose float32 would know where a row lies a little differently on each rank.
        high = [_row(wide, first_row, row, size[0], new_size[0]) for row in range(rows.start, rows.stop)]
        picture.copy_(torch.from_numpy(np.stack(high)).permute(2, 0, 1))
    return resized


def _row(wide_EWC: np.ndarray, first_row: int, row: int, height: int, new_height: int) -> np.ndarray:
    """A row at its new height, by Pillow's arithmetic: weights rounded to `PRECISION` bits, bytes [W, C]."""
    scale = height / new_height
    stretch = max(1.0, scale)
    centre = (row + 0.5) * scale
    first = max(0, int(centre - SUPPORT * stretch + 0.5))
    stop = min(height, int(centre + SUPPORT * stretch + 0.5))
    weights = [_bicubic(abs((each - centre + 0.5) * (1.0 / stretch))) for each in range(first, stop)]
    whole = sum(weights)
    fixed = [int(weight / whole * 2**PRECISION + copysign(0.5, weight)) for weight in weights]
    low_KWC = wide_EWC[first - first_row : stop - first_row].astype(np.int32)
    total_WC = np.tensordot(np.array(fixed, np.int32), low_KWC, axes=1) + 2 ** (PRECISION - 1)
    return (total_WC >> PRECISION).clip(0, 255).astype(np.uint8)


def _bicubic(distance: float) -> float:
    """Weight of a row so far away, with Pillow's a = -1/2."""
    if distance < 1:
        return (1.5 * distance - 2.5) * distance * distance + 1
    return (((distance - 5) * distance + 8) * distance - 4) * -0.5 if distance < SUPPORT else 0.0
