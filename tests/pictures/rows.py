"""Pictures in parts, as stripes of ranks arrive."""

from collections.abc import Iterator

import numpy as np


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    """uint8 [height, width, 3]; with runs of one colour, ties and steps between them."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (-(-height // 5), -(-width // 7), 3), np.uint8)
    flat = coarse.repeat(5, axis=0).repeat(7, axis=1)[:height, :width]
    return np.where(rng.random((height, width, 1)) < 0.5, flat, rng.integers(0, 256, flat.shape, np.uint8))


def split(picture: np.ndarray, seed: int = 0) -> Iterator[np.ndarray]:
    """Parts of random heights, some of them empty."""
    rng = np.random.default_rng(seed)
    top = 0
    while top < len(picture):
        rows = int(rng.integers(0, 40))
        yield picture[top : top + rows]
        top += rows
