"""Memory of a command: the proportional set sizes of all its processes, added up from time to time. Linux."""

import subprocess
import time
from pathlib import Path


def highest_memory(process: subprocess.Popen, every: float) -> int:
    """Bytes: the highest sum over `process` and its descendants until it ends, read each `every` seconds."""
    highest = 0
    while process.poll() is None:
        highest = max(highest, sum(map(proportional_set_size, family(process.pid))))
        time.sleep(every)
    return highest


def family(pid: int) -> list[int]:
    """A process and its descendants."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [pid, *(member for child in children for member in family(int(child)))]


def proportional_set_size(pid: int) -> int:
    """Bytes of resident memory; a page shared by n processes counts 1/n in each."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
