"""A picture as tiles of a pyramid, for people who look into it; made once, beside the picture."""

import threading
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

SIDE = 512
"""Pixels of a tile's side."""
QUALITY = 90


def levels_of(size: tuple[int, int]) -> int:
    """Levels of a pyramid, each half of the one before, down to one tile."""
    longest, levels = max(size), 1
    while longest > SIDE:
        longest, levels = -(-longest // 2), levels + 1
    return levels


@dataclass(frozen=True)
class Pyramids:
    """Tiles beside pictures; one pyramid is made at a time, as it takes a picture's memory."""

    _lock: threading.Lock = field(default_factory=threading.Lock)

    def tile(self, picture: Path, level: int, column: int, row: int) -> Path | None:
        """The file of a tile, level 0 being the picture's own size; None: there is no such tile."""
        folder = picture.with_name(f"{picture.stem}.tiles")
        with self._lock:
            if not folder.exists():
                _make(picture, folder)
        found = folder / f"{level}_{column}_{row}.jpg"
        return found if found.is_file() else None


def _make(picture: Path, folder: Path) -> None:
    partial = folder.with_name(f"{folder.name}.partial")
    partial.mkdir(exist_ok=True)
    with Image.open(picture) as opened:
        image = opened.convert("RGB")
    for level in range(levels_of(image.size)):
        if level:
            image = image.reduce(2)
        for top in range(0, image.height, SIDE):
            for left in range(0, image.width, SIDE):
                box = left, top, min(left + SIDE, image.width), min(top + SIDE, image.height)
                image.crop(box).save(
                    partial / f"{level}_{left // SIDE}_{top // SIDE}.jpg", quality=QUALITY, subsampling=0
                )
    partial.rename(folder)
