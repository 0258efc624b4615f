"""A small copy of a large picture, made while its rows pass by."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from clear_dist.pictures.blocks import BLOCK_ROWS
from clear_dist.pictures.whole import JPEG_OPTIONS

LONGEST_SIDE = 1024
FACTORS = (1, 2, 4, 8, 16)


class Thumbnail:
    """Averages of factor x factor pixels; no side is longer than LONGEST_SIDE pixels if a factor allows it."""

    def __init__(self, height: int, width: int) -> None:
        fitting = (factor for factor in FACTORS if max(height, width) <= LONGEST_SIDE * factor)
        self.factor = next(fitting, FACTORS[-1])
        self.image = Image.new("RGB", (-(-width // self.factor), -(-height // self.factor)))

    def watching(self, blocks: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
        """`blocks`, uint8 [BLOCK_ROWS, width, 3] but for the last one, unchanged."""
        for index, block in enumerate(blocks):
            reduced = Image.fromarray(block).reduce(self.factor)
            self.image.paste(reduced, (0, index * BLOCK_ROWS // self.factor))
            yield block

    def save(self, file: Path) -> None:
        """As a JPEG."""
        self.image.save(file, **JPEG_OPTIONS)
