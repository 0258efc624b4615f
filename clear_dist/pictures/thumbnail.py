"""Blocks of a picture's rows, and a small copy that is made while they pass by."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from clear_dist.pictures.srgb import profile
from clear_dist.pictures.whole import JPEG_OPTIONS

CHANNELS = 3
BLOCK_ROWS = 16
"""Rows compressed at once, and of a strip of a TIFF; a multiple of all FACTORS."""
LONGEST_SIDE = 1024
FACTORS = (1, 2, 4, 8, 16)


def in_blocks(rows: Iterable[np.ndarray], height: int, width: int) -> Iterator[np.ndarray]:
    """Copies of `rows` as uint8 [BLOCK_ROWS, width, 3], the last one maybe lower; no part of `rows` is kept alive."""
    left = height
    block, filled = _empty(left, width), 0
    for part in rows:
        assert part.dtype == np.uint8 and part.shape[1:] == (width, CHANNELS), f"{part.dtype} {part.shape}"
        start = 0
        while start < len(part):
            assert left, f"more than {height} rows"
            taken = min(len(part) - start, len(block) - filled)
            block[filled : filled + taken] = part[start : start + taken]
            start, filled = start + taken, filled + taken
            if filled == len(block):
                yield block
                left -= filled
                block, filled = _empty(left, width), 0
        del part  # before the next one is asked for
    assert left == 0, f"{left - filled} of {height} rows are missing"


def _empty(left: int, width: int) -> np.ndarray:
    return np.empty((min(BLOCK_ROWS, left), width, CHANNELS), np.uint8)


class Thumbnail:
    """Averages of factor x factor pixels, with sides of at most LONGEST_SIDE pixels if a factor allows it."""

    def __init__(self, height: int, width: int) -> None:
        fitting = (factor for factor in FACTORS if max(height, width) <= LONGEST_SIDE * factor)
        self.factor = next(fitting, FACTORS[-1])
        self.image = Image.new("RGB", (-(-width // self.factor), -(-height // self.factor)))

    def watching(self, blocks: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
        for index, block in enumerate(blocks):
            reduced = Image.fromarray(block).reduce(self.factor)
            self.image.paste(reduced, (0, index * BLOCK_ROWS // self.factor))
            yield block

    def save(self, file: Path) -> None:
        self.image.save(file, **JPEG_OPTIONS, icc_profile=profile())
