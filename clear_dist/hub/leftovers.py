"""What interrupted downloads have left: the hub's library continues no partial file, nor removes it when killed."""

import time
from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout

SECONDS_OF_REST = 60.0
"""Unchanged for so long it is not being written: there are file systems whose locks hold nobody back."""


def remove_leftovers(cache: Path, folder: str) -> int:
    """Remove a repository's partial files that nobody is writing; returns their bytes.

    Args:
        folder: the repository's, in the cache.
    """
    removed = 0
    for file in (cache / folder / "blobs").glob("*.incomplete"):
        lock = cache / ".locks" / folder / f"{file.name.split('.')[0]}.lock"
        with suppress(OSError, Timeout):  # gone meanwhile, not ours to remove, or being written
            lock.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(lock, blocking=False):
                status = file.stat()
                if time.time() - status.st_mtime > SECONDS_OF_REST:
                    file.unlink()
                    removed += status.st_size
    return removed
