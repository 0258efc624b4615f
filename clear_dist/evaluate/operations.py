"""Operations of a layer's attention, as the paper counts them (Fig. 2): 4 x sum of M x c; M: mask, c: channels.

No tensors: pairs of queries and keys are counted, row by row of the circle.
"""

from collections.abc import Mapping
from types import MappingProxyType

from clear_dist.evaluate.figures import Figure
from clear_dist.geometry import half_widths
from clear_dist.options import Window
from clear_dist.stages import Size

GIGA = 1e9
PRINTED: Mapping[tuple[Size, int, int], str] = MappingProxyType(
    {
        ((64, 64), 16, 3_072): "the paper prints 80.6 (Table 2)",
        ((64, 64), 16, 2_432): "the paper prints 63.8 (Table 8)",
    }
)
"""Where the paper's figure is not the one by its own rule: by grid, radius and channels."""


def counted(grid: Size, window: Window, *, down_factor: int, channels: int, text_tokens: int) -> Figure:
    """GFLOPs of one layer; `grid` is height and width in tokens."""
    pairs = attended(grid, window, down_factor=down_factor, text_tokens=text_tokens)
    is_printed = isinstance(window, int) and down_factor == 1 and text_tokens == 512
    note = PRINTED.get((grid, int(window), channels), "") if is_printed else ""
    return Figure(value=4 * channels * pairs / GIGA, note=note)


def attended(grid: Size, window: Window, *, down_factor: int, text_tokens: int) -> int:
    """Pairs of a query and a key that it sees: text sees all and is seen by all, an image token also its window.

    With a down factor d each d x d tokens are one more key for all image queries.
    """
    image = grid[0] * grid[1]
    seen = image**2 if window == "full" else in_circles(grid, int(window))
    pooled = image * (image // down_factor**2) if down_factor > 1 else 0
    return text_tokens * (text_tokens + 2 * image) + seen + pooled


def in_circles(grid: Size, radius: int) -> int:
    """Pairs of image tokens less than `radius` apart, strictly (Eq. 3)."""
    height, width = grid
    total = 0
    for down, reach in enumerate(half_widths(radius)):
        across = sum(max(0, width - abs(x)) for x in range(-reach, reach + 1))
        total += (1 if down == 0 else 2) * max(0, height - down) * across
    return total
