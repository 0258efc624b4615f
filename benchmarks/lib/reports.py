"""Reports of `clear-dist generate` with the embedded model, for benchmarks that read their figures there."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.lib.processes import highest_memory

COMMAND = (sys.executable, "-c", "from clear_dist.cli import main; main()", "generate")
DEMO = ("--model", "demo", "--device", "cpu", "--seed", "0")
MEGA = 1e6


def report_of(*flags: str, every: float | None = None) -> dict[str, Any]:
    """The report of one generation with `flags`, in one stage; the picture is thrown away.

    Args:
        every: seconds between looks at the memory of all processes; their highest sum is added to the report as
            "bytes_of_all_processes".

    Raises:
        subprocess.CalledProcessError: the command failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        files = ("--report", str(report), "--output", str(Path(folder) / "picture.png"))
        command = [*COMMAND, *DEMO, "--cascade", "off", *files, *flags]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        memory = {} if every is None else {"bytes_of_all_processes": highest_memory(process, every)}
        if process.wait():
            raise subprocess.CalledProcessError(process.returncode, command)
        return json.loads(report.read_text()) | memory
