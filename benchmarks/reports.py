"""Runs the command with the embedded model and returns its report, for benchmarks that read their figures there."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

COMMAND = (sys.executable, "-c", "from clear_dist.cli import main; main()")


def report_of(*flags: str) -> dict[str, Any]:
    """The report of `clear-dist generate --model demo --device cpu --seed 0` with `flags`, its picture thrown away."""
    with tempfile.TemporaryDirectory() as folder:
        report, picture = Path(folder) / "report.json", Path(folder) / "picture.png"
        own = ("--model", "demo", "--device", "cpu", "--seed", "0", "--report", str(report), "--output", str(picture))
        subprocess.run([*COMMAND, "generate", *own, *flags], check=True, capture_output=True)
        return json.loads(report.read_text())
