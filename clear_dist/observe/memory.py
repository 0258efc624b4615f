"""Free memory of the host: what the system has, and what this process's cgroups leave of it."""

from collections.abc import Iterator
from pathlib import Path

UNKNOWN = 2**62
"""Bytes free, or that a cgroup leaves, where nothing tells."""


def free_bytes(root: Path = Path("/")) -> int:
    """Bytes that can be had without swapping, within the limits of cgroups of either version; `root` is for tests."""
    return min(_available(root), *(_left(*files) for files in _cgroups(root)), UNKNOWN)


def _available(root: Path) -> int:
    try:
        return 1024 * int((root / "proc/meminfo").read_text().split("MemAvailable:")[1].split()[0])
    except (OSError, LookupError, ValueError):  # not Linux
        return UNKNOWN


def _cgroups(root: Path) -> Iterator[tuple[Path, Path, Path, str]]:
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    base = root / "sys/fs/cgroup"
    for line in lines:
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0":
            top, names, dropped = base, ("memory.max", "memory.current"), "inactive_file"
        elif "memory" in controllers.split(","):
            top, names = base / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")
            dropped = "total_inactive_file"
        else:
            continue
        inner = top / path.strip("/")
        # In a container the path may be the host's, which does not exist; then the limit stands at the top.
        for folder in (inner, *inner.parents):
            if folder == top or top in folder.parents:
                yield folder / names[0], folder / names[1], folder / "memory.stat", dropped


def _left(limit: Path, usage: Path, statistics: Path, dropped: str) -> int:
    """Bytes that a group may still take; file pages not in use count as free."""
    try:
        most, taken = int(limit.read_text()), int(usage.read_text())
        figures = dict(line.split() for line in statistics.read_text().splitlines())
        return max(0, most - taken + int(figures.get(dropped, 0)))
    except (OSError, ValueError):  # no such group, or "max"
        return UNKNOWN
