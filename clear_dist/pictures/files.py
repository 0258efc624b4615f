"""Names of pictures, and files that appear whole or not at all."""

import secrets
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType


def numbered(file: Path, index: int, count: int) -> Path:
    """Name of picture `index` of `count`: `file` itself if it is the only one, else with -0, -1 ... in its name."""
    digits = len(str(count - 1))
    return file if count == 1 else file.with_name(f"{file.stem}-{index:0{digits}d}{file.suffix}")


def stage_file(file: Path, height: int, width: int) -> Path:
    return file.with_name(f"{file.stem}.{width}x{height}{file.suffix}")


def preview_of(file: Path) -> Path:
    """Name of all previews of `file`, each of which replaces the one before."""
    return file.with_name(f"{file.stem}.preview.png")


def thumbnail_of(file: Path) -> Path:
    return file.with_name(f"{file.stem}.thumbnail.jpg")


def keeps_alpha(file: Path) -> bool:
    """Whether a picture's format has transparency."""
    return file.suffix.lower() not in (".jpg", ".jpeg")


@contextmanager
def replacing(file: Path, *, within: Path | None = None) -> Iterator[Path]:
    """Temporary name beside `file`, with the same ending; becomes `file` at the end, and vanishes on failure.

    A symlink stays one: what it points to is replaced. `within`: another folder of the same disk for the temporary one.
    """
    file = file.resolve()
    name = f".{secrets.token_hex(8)}{file.suffix}"  # short: `file` may have the longest name allowed
    partial = (within or file.parent) / name
    try:
        with _raising_on_sigterm():
            yield partial
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def _raising_on_sigterm() -> Iterator[None]:
    """Time to tidy up at a SIGTERM, with which a launcher ends ranks."""

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
