"""Formats that cannot be written row by row: JPEG and WebP."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from clear_dist.pictures.srgb import profile

MODES = {3: "RGB", 4: "RGBA"}
"""Pillow's, by channels."""
EXIF_DESCRIPTION, EXIF_SOFTWARE = 0x010E, 0x0131
MOST_EXIF_BYTES = 60_000
"""Limit of the description: a JPEG holds less than 64 KB of EXIF."""
JPEG_OPTIONS: Mapping[str, Any] = {"quality": 95, "subsampling": 0}
SAVE_OPTIONS: Mapping[str, Mapping[str, Any]] = {
    ".jpg": JPEG_OPTIONS,
    ".jpeg": JPEG_OPTIONS,
    ".webp": {"quality": 95},
}


def write(
    blocks: Iterator[np.ndarray],
    file: Path,
    shape: tuple[int, int, int],
    metadata: Mapping[str, str],
    *,
    quality: int | None = None,
) -> None:
    height, width, channels = shape
    image, top = Image.new(MODES[channels], (width, height)), 0
    for block in blocks:
        image.paste(Image.fromarray(block), (0, top))
        top += len(block)
    options = {**SAVE_OPTIONS.get(file.suffix.lower(), {}), "icc_profile": profile()}
    if quality is not None:
        options["quality"] = quality
    if metadata:
        options["exif"] = _exif(metadata)
    image.save(file, **options)


def _exif(metadata: Mapping[str, str]) -> Image.Exif:
    exif = Image.Exif()
    exif[EXIF_DESCRIPTION] = _description(metadata)
    exif[EXIF_SOFTWARE] = metadata.get("Software", "")
    return exif


def _description(metadata: Mapping[str, str]) -> str:
    """A JSON object that fits; the longest values are cut until it does."""
    kept = dict(metadata)
    while len(text := json.dumps(kept)) > MOST_EXIF_BYTES:
        longest = max(kept, key=lambda name: len(kept[name]))
        kept[longest] = f"{kept[longest][: len(kept[longest]) * 3 // 4]}..."
    return text
