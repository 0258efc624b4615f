"""Partial downloads that nobody continues are removed, those under way are not."""

import os
import time
from pathlib import Path

from filelock import FileLock

from clear_dist.hub.fetching import remove_leftovers

FOLDER = "models--someone--tiny"


def partial_file(cache: Path, name: str, *, age: float) -> Path:
    file = cache / FOLDER / "blobs" / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(bytes(100))
    then = time.time() - age
    os.utime(file, (then, then))
    return file


def test_only_old_partial_files_that_nobody_locks_are_removed(tmp_path: Path) -> None:
    old = partial_file(tmp_path, "aa.01234567.incomplete", age=3_600)
    fresh = partial_file(tmp_path, "aa.89abcdef.incomplete", age=0)
    locked = partial_file(tmp_path, "bb.01234567.incomplete", age=3_600)
    whole = partial_file(tmp_path, "cc", age=3_600)
    held = tmp_path / ".locks" / FOLDER / "bb.lock"
    held.parent.mkdir(parents=True)
    with FileLock(held):
        assert remove_leftovers(tmp_path, FOLDER) == 100
    assert [file.exists() for file in (old, fresh, locked, whole)] == [False, True, True, True]


def test_a_repository_that_was_never_downloaded_has_none(tmp_path: Path) -> None:
    assert remove_leftovers(tmp_path, FOLDER) == 0
    assert not list(tmp_path.iterdir())
