"""Bicubic interpolation of some rows of a picture, equal to the whole picture's.

Shapes: B batch, C channels, E low rows behind mine, R my high rows, W columns of the low picture.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from clear_dist.geometry import Rows

MAX_BYTES = 1 << 26
A = -0.75
"""Parameter of the cubic convolution kernel, as in torch."""
TAPS = 4
BYTES_PER_VALUE = 4


def rows_behind(rows: Rows, height: int, new_height: int) -> Rows:
    """Rows of a picture of `height` that determine `rows` of it at `new_height`; none for none."""
    if not len(rows):
        return Rows(0, 0)
    first, last = (_row_above(row, height, new_height) for row in (rows.start, rows.stop - 1))
    return Rows(max(0, first - 1), min(height, last + 3))


@torch.no_grad()
def resize_rows(
    pixels_BCEW: Tensor,
    first_row: int,
    *,
    size: tuple[int, int],
    new_size: tuple[int, int],
    rows: Rows,
    max_bytes: int = MAX_BYTES,
) -> Tensor:
    """`rows` of `F.interpolate(whole picture, new_size, mode="bicubic")`, [B, C, R, new width], to float32's rounding.

    Args:
        pixels_BCEW: at least the rows `rows_behind(rows, ...)`, from `first_row` on; the result has their dtype.
        size, new_size: height and width of the whole picture before and after.
        max_bytes: limit of the temporary tensors; a chunk has one row at least.
    """
    batch, channels, held, width = pixels_BCEW.shape
    behind = rows_behind(rows, size[0], new_size[0])
    assert width == size[1], f"{width} columns of a picture of {size}"
    assert not len(rows) or first_row <= behind.start < behind.stop <= first_row + held, f"{behind} of {held} rows"
    resized = pixels_BCEW.new_empty(batch, channels, len(rows), new_size[1])
    for chunk in _chunks(rows, size, new_size, max_bytes // (batch * channels * BYTES_PER_VALUE)):
        behind = rows_behind(chunk, size[0], new_size[0])
        part = pixels_BCEW[:, :, behind.relative_to(first_row)].float()
        wide = F.interpolate(part, (len(behind), new_size[1]), mode="bicubic", align_corners=False)
        resized[:, :, chunk.relative_to(rows.start)] = _mix(wide, behind.start, chunk, size[0], new_size[0])
    return resized


def _chunks(rows: Rows, size: tuple[int, int], new_size: tuple[int, int], max_values: int) -> Iterator[Rows]:
    per_low_row = size[1] + new_size[1]
    per_row = per_low_row * size[0] / new_size[0] + 2 * new_size[1]
    count = max(1, int((max_values - TAPS * per_low_row) / per_row))
    for start in range(rows.start, rows.stop, count):
        yield Rows(start, min(start + count, rows.stop))


def _mix(wide: Tensor, first_row: int, rows: Rows, height: int, new_height: int) -> Tensor:
    above_R = torch.tensor([_row_above(row, height, new_height) for row in range(rows.start, rows.stop)])
    mixed = None
    for tap, weight_R in enumerate(_weights(above_R, rows, height, new_height), start=-1):
        # The row at the border counts for those beyond it.
        places_R = (above_R + tap).clamp_(0, height - 1) - first_row
        picked = wide.index_select(2, places_R.to(wide.device))
        weight_R1 = weight_R[:, None].to(wide.device)
        mixed = picked.mul_(weight_R1) if mixed is None else mixed.addcmul_(picked, weight_R1)
    assert mixed is not None
    return mixed


def _weights(above_R: Tensor, rows: Rows, height: int, new_height: int) -> list[Tensor]:
    """Weights [R] of the low rows -1, 0, 1 and 2 after the one above."""
    # Positions are rounded once, as torch's are: at row 8192 that makes steps of 1/1024, which exact ones would miss.
    scale = torch.tensor(height, dtype=torch.float32) / new_height
    centres_R = torch.arange(rows.start, rows.stop, dtype=torch.float64) + 0.5
    positions_R = (centres_R * scale.double() - 0.5).float()
    past_R = positions_R.double() - above_R
    return [_kernel(distance_R).float() for distance_R in (past_R + 1, past_R, 1 - past_R, 2 - past_R)]


def _kernel(distance: Tensor) -> Tensor:
    """Cubic convolution kernel (Keys, 1981) at distances of up to 2 rows."""
    distance = distance.abs()
    near = ((A + 2) * distance - (A + 3)) * distance**2 + 1
    far = ((A * distance - 5 * A) * distance + 8 * A) * distance - 4 * A
    return torch.where(distance <= 1, near, far)


def _row_above(row: int, height: int, new_height: int) -> int:
    """Last row of the low picture with its centre not below that of this row of the high one; -1: none."""
    return ((2 * row + 1) * height - new_height) // (2 * new_height)
