"""Pictures to disk: whole or not at all, with what made them in their metadata."""

import json
import secrets
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

EXIF_DESCRIPTION, EXIF_SOFTWARE = 0x010E, 0x0131
MOST_EXIF_BYTES = 60_000
"""Of the description: a JPEG holds less than 64 KB of EXIF."""
SAVE_OPTIONS: Mapping[str, dict[str, Any]] = {
    ".jpg": {"quality": 95, "subsampling": 0},
    ".jpeg": {"quality": 95, "subsampling": 0},
    ".webp": {"quality": 95},
    ".tif": {"compression": "tiff_adobe_deflate"},
    ".tiff": {"compression": "tiff_adobe_deflate"},
}


def numbered(file: Path, index: int, count: int) -> Path:
    """The name of picture `index` of `count`: `file` itself if it is the only one, else with -0, -1 ... in its name."""
    digits = len(str(count - 1))
    return file if count == 1 else file.with_name(f"{file.stem}-{index:0{digits}d}{file.suffix}")


def save_picture(image: Image.Image, file: Path, metadata: Mapping[str, str]) -> None:
    """Write `image` in the format of the file's ending.

    Args:
        metadata: by name; text chunks of a PNG, a JSON object as the EXIF description elsewhere, where long values
            are cut and end in "...".

    Raises:
        OSError: it cannot be written; then nothing is left behind.
    """
    ending = file.suffix.lower()
    options = dict(SAVE_OPTIONS.get(ending, {}))
    if ending == ".png":
        options["pnginfo"] = _text_chunks(metadata)
    else:
        options["exif"] = _exif(metadata)
    with replacing(file) as partial:
        image.save(partial, **options)


@contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """A temporary name beside `file`, with the same ending; becomes `file` at the end, and vanishes on failure."""
    partial = file.with_name(f".{secrets.token_hex(8)}{file.suffix}")  # short: `file` may have the longest name allowed
    try:
        with _raising_on_sigterm():
            yield partial
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def _raising_on_sigterm() -> Iterator[None]:
    """A launcher ends ranks with SIGTERM, which by default leaves no time to tidy up."""

    def stop(number: int, _: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = signal.getsignal(signal.SIGTERM)
    if before is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _text_chunks(metadata: Mapping[str, str]) -> PngInfo:
    chunks = PngInfo()
    for name, value in metadata.items():
        chunks.add_itxt(name, value)
    return chunks


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
