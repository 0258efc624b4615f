"""Rows of a picture as they arrive, cut anew."""

from collections.abc import Iterable, Iterator

import numpy as np

CHANNELS = 3
BLOCK_ROWS = 16
"""What is compressed at once, and a strip of a TIFF; a multiple of all factors of a thumbnail."""


def in_blocks(rows: Iterable[np.ndarray], height: int, width: int) -> Iterator[np.ndarray]:
    """`rows` as uint8 [BLOCK_ROWS, width, 3], the last block maybe lower; copies, so that no part is kept alive."""
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
