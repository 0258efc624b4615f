"""The main job on one machine: time, memory of all ranks together, seams.  python benchmarks/large.py [--json FILE]

Runs `torchrun --nproc_per_node N clear-dist generate --res R` with the embedded model, adds up the proportional set
sizes of all its processes every few seconds, and then looks at the picture: do rows differ more where two ranks'
stripes meet than where tokens meet beside?
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
TOKEN = 16
"""Pixels along the side of a token."""
BESIDE = 8
"""Borders between tokens, on either side of a border between ranks, that it is compared with: rows differ more where
tokens meet than within them, whoever drew them."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--res", type=int, default=8192)
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=Path("large"), help="for the picture and its report")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    arguments.folder.mkdir(exist_ok=True)
    picture, report = arguments.folder / "picture.png", arguments.folder / "report.json"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*torchrun, "--nproc_per_node", str(arguments.ranks), str(ROOT / "clear-dist"), "generate"]
    flags = ["--res", str(arguments.res), "--seed", str(arguments.seed), "--device", "cpu", "--model", "demo"]
    figures = measure([*command, *flags, "--output", str(picture), "--report", str(report)])
    contents = json.loads(report.read_text())
    figures["seams"] = seams(picture, [TOKEN * start for start, _ in contents["stripes"][1:]])
    show(figures, contents)
    if arguments.json is not None:
        kept = {name: contents[name] for name in ("versions", "stripes", "seconds", "stages", "peak_memory_bytes")}
        arguments.json.write_text(json.dumps({"command": flags, **figures, **kept}, indent=1) + "\n")


def measure(command: list[str], every: float = 3.0) -> dict[str, Any]:
    """Seconds of the whole command, and the highest sum of its processes' proportional set sizes seen, in bytes."""
    began, highest = time.time(), 0
    process = subprocess.Popen(command)
    while process.poll() is None:
        time.sleep(every)
        highest = max(highest, sum(map(proportional_set_size, family(process.pid))))
    if process.returncode:
        raise SystemExit(process.returncode)
    return {"seconds_of_command": time.time() - began, "bytes_of_all_processes": highest}


def family(pid: int) -> list[int]:
    """A process and its descendants."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [pid, *(member for child in children for member in family(int(child)))]


def proportional_set_size(pid: int) -> int:
    """Bytes; pages that several processes share count in each by their share."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))


def seams(picture: Path, borders: list[int]) -> dict[int, float]:
    """For each border between ranks, how much rows differ across it, over the median across token borders beside."""
    with Image.open(picture) as image:
        rows = np.asarray(image.convert("RGB"))

    def difference(border: int) -> float:
        return float(np.abs(rows[border].astype(np.int16) - rows[border - 1]).mean())

    beside = [TOKEN * step for step in range(-BESIDE, BESIDE + 1) if step]
    return {
        border: difference(border)
        / max(1e-9, median(difference(border + step) for step in beside if 0 < border + step < len(rows)))
        for border in borders
    }


def show(figures: dict[str, Any], report: dict[str, Any]) -> None:
    table = Table("stage", "stripes", "seconds of denoising", "seconds per step", "encoding", "decoding")
    for stage in report["stages"]:
        seconds, steps = stage["seconds"], stage["seconds_per_step"]
        side = " x ".join(str(TOKEN * tokens) for tokens in reversed(stage["grid"]))
        times = (seconds["denoise"], median(steps), seconds["encode"], seconds["decode"])
        table.add_row(side, str(len(stage["stripes"])), *(f"{value:.1f}" for value in times))
    console = Console()
    console.print(table)
    console.print(f"the whole command: {figures['seconds_of_command']:.0f} s")
    console.print(f"all processes together: {figures['bytes_of_all_processes'] / 2**30:.1f} GiB")
    worst = max(figures["seams"].values(), default=0.0)
    console.print(f"differences across rank borders: at most {worst:.2f} times those across token borders beside")


if __name__ == "__main__":
    main()
