"""Results on disk, a folder for each job with its pictures and what it was; the oldest make room for the newest."""

import json
import re
import shutil
import threading
import time
from collections.abc import Iterator, Set
from contextlib import suppress
from pathlib import Path
from typing import Any

from clear_dist.launch.ends import describe, say

RECORD = "job.json"
NAME = re.compile(r"job_[\w-]{22}", re.ASCII)

Record = dict[str, Any]


class Store:
    """Folders by the names of jobs, the oldest first. Safe between threads."""

    def __init__(self, folder: Path, *, most_bytes: float, most_seconds: float) -> None:
        """Take over what is there from servers of before."""
        self._folder, self._most_bytes, self._most_seconds = folder, most_bytes, most_seconds
        self._lock = threading.RLock()
        self._held: dict[str, tuple[float, int]] = {}
        """When each was made, and its bytes."""
        found = [each for each in folder.iterdir() if NAME.fullmatch(each.name) and each.is_dir()]
        records = ((each.name, self.read(each.name)) for each in found)
        known = sorted((float(record["created"]), name) for name, record in records if record is not None)
        self._held = {name: (created, self._size(name)) for created, name in known}

    def folder_of(self, name: str) -> Path:
        return self._folder / name

    def save(self, name: str, record: Record) -> None:
        """Write what a job is now, and remove what there is no room for."""
        with self._lock:
            try:
                partial = self.folder_of(name) / f"{RECORD}.partial"
                partial.write_text(json.dumps(record))
                partial.replace(self.folder_of(name) / RECORD)
            except OSError as error:  # no reason to lose the pictures
                say(f"warning: a job's record cannot be written: {describe(error)}")
                return
            self._held[name] = float(record["created"]), self._size(name)

    def read(self, name: str) -> Record | None:
        """None: there is no such job."""
        if NAME.fullmatch(name) is None:
            return None
        with suppress(OSError, ValueError):
            record = json.loads((self.folder_of(name) / RECORD).read_text())
            if isinstance(record, dict) and {"created", "status"} <= record.keys():
                return record
        return None

    def newest(self, count: int) -> Iterator[Record]:
        with self._lock:
            names = list(self._held)[::-1]
        for name in names[:count]:
            if (record := self.read(name)) is not None:
                yield record

    def remove(self, name: str) -> None:
        with self._lock:
            self._held.pop(name, None)
            shutil.rmtree(self.folder_of(name), ignore_errors=True)

    def make_room(self, busy: Set[str]) -> None:
        """Remove what is too old, and the oldest until the rest is small enough; never a busy one, nor the newest."""
        with self._lock:
            total, now = sum(size for _, size in self._held.values()), time.time()
            for name, (created, size) in list(self._held.items())[:-1]:
                is_old = now - created > self._most_seconds
                if name not in busy and (is_old or total > self._most_bytes):
                    total -= size
                    self.remove(name)

    def _size(self, name: str) -> int:
        with suppress(OSError):
            return sum(file.stat().st_size for file in self.folder_of(name).rglob("*"))
        return 0
