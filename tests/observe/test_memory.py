"""Free memory of the host, by files as Linux writes them."""

from pathlib import Path

import pytest

from clear_dist.observe.memory import UNKNOWN, free_bytes

GB = 10**9


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)


SYSTEM = {"proc/meminfo": "MemTotal:  9000000 kB\nMemAvailable:    8000000 kB\nBuffers: 1 kB\n"}
FREE = 8_000_000 * 1024
GROUP_2 = {
    "proc/self/cgroup": "0::/slice/job\n",
    "sys/fs/cgroup/slice/job/memory.max": f"{4 * GB}\n",
    "sys/fs/cgroup/slice/job/memory.current": f"{3 * GB}\n",
    "sys/fs/cgroup/slice/job/memory.stat": f"anon 5\ninactive_file {GB}\n",
}
GROUP_1 = {
    "proc/self/cgroup": "5:cpu:/x\n4:memory:/slice/job\n1:name=systemd:/\n0::/\n",
    "sys/fs/cgroup/memory/slice/job/memory.limit_in_bytes": f"{4 * GB}\n",
    "sys/fs/cgroup/memory/slice/job/memory.usage_in_bytes": f"{3 * GB}\n",
    "sys/fs/cgroup/memory/slice/job/memory.stat": f"inactive_file 7\ntotal_inactive_file {GB}\n",
}


def moved(files: dict[str, str], old: str, new: str) -> dict[str, str]:
    return {name.replace(old, new): text for name, text in files.items()}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, UNKNOWN),
        (SYSTEM, FREE),
        (SYSTEM | GROUP_2, 2 * GB),
        (SYSTEM | GROUP_1, 2 * GB),
        (SYSTEM | GROUP_2 | {"sys/fs/cgroup/slice/job/memory.max": "max\n"}, FREE),
        (SYSTEM | GROUP_1 | {"sys/fs/cgroup/memory/slice/job/memory.limit_in_bytes": f"{2**63 - 4096}"}, FREE),
        (SYSTEM | moved(GROUP_2, "/job/", "/"), 2 * GB),  # a group around ours
        (SYSTEM | moved(GROUP_1, "/job/", "/"), 2 * GB),
        (SYSTEM | moved(GROUP_1, "/slice/job/", "/"), 2 * GB),  # a container that does not show its path
        (SYSTEM | GROUP_2 | {"sys/fs/cgroup/slice/job/memory.current": f"{9 * GB}"}, 0),
        (SYSTEM | GROUP_2 | {"proc/self/cgroup": "0::/other\n"}, FREE),
        (GROUP_2, 2 * GB),
    ],
)
def test_the_tightest_limit_counts(tmp_path: Path, files: dict[str, str], expected: int) -> None:
    write(tmp_path, files)
    assert free_bytes(tmp_path) == expected


def test_this_machine_tells() -> None:
    assert 10**7 < free_bytes() < 10**13
