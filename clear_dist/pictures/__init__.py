"""Pictures on disk, whole or not at all, with metadata; PNG and TIFF are written while rows arrive."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from clear_dist.pictures.files import keeps_alpha, numbered, preview_of, replacing, stage_file, thumbnail_of

if TYPE_CHECKING:
    import numpy as np

    from clear_dist.pictures.alpha import Alpha

__all__ = ["files_of", "keeps_alpha", "numbered", "preview_of", "replacing", "save_picture", "stage_file"]

MOST_WITHOUT_THUMBNAIL = 4096
"""Longer side in pixels that viewers open at ease."""
Writer: TypeAlias = Callable[[Iterator["np.ndarray"], Path, tuple[int, int, int], Mapping[str, str]], None]
"""Writes uint8 [some rows, width, channels], parts of a picture [height, width, channels]."""


def files_of(file: Path, *, height: int, width: int) -> list[Path]:
    """Files that `save_picture` writes: the picture and, if it is large, its thumbnail."""
    return [file, thumbnail_of(file)] if max(height, width) > MOST_WITHOUT_THUMBNAIL else [file]


def save_picture(
    rows: Iterable["np.ndarray"],
    file: Path,
    *,
    height: int,
    width: int,
    metadata: Mapping[str, str] | None,
    alpha: "Alpha | None" = None,
    quality: int | None = None,
    within: Path | None = None,
) -> list[Path]:
    """Write a picture in the format of the file's ending; returns the files written.

    Rows are uint8 [some rows, width, 3], from the top, in sRGB; `alpha` is resized to them. `quality`, 0 to 100, is for
    JPEG and WebP. Metadata are text chunks of a PNG, elsewhere a JSON description (in EXIF long values are cut and end
    in "..."). Raises OSError; then, as when `rows` raises, nothing is left behind. `within` as in `replacing`.
    """
    # Numpy and Pillow: checks and --help do without.
    from clear_dist.pictures.thumbnail import Thumbnail, in_blocks

    files = files_of(file, height=height, width=width)
    blocks = in_blocks(rows, height, width)
    with ExitStack() as stack:
        # The picture is renamed first.
        partials = [stack.enter_context(replacing(each, within=within)) for each in reversed(files)]
        thumbnail = Thumbnail(height, width) if len(files) > 1 else None
        watched = blocks if thumbnail is None else thumbnail.watching(blocks)
        shown = watched if alpha is None else alpha.put_back(watched, height, width)
        _writer(file, quality)(shown, partials[-1], (height, width, 3 if alpha is None else 4), metadata or {})
        next(watched, None)  # a writer stops at the last row, `rows` may have more to do
        if thumbnail is not None:
            thumbnail.save(partials[0])
    return files


def _writer(file: Path, quality: int | None) -> Writer:
    match file.suffix.lower():
        case ".png":
            from clear_dist.pictures.png import write
        case ".tif" | ".tiff":
            from clear_dist.pictures.tiff import write
        case _:
            from clear_dist.pictures import whole

            write = whole.write if quality is None else partial(whole.write, quality=quality)
    return write
