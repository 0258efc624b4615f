"""How long does the main job take on one machine, in how much memory, and does the picture show seams?

    python -m benchmarks.memory.large --json large.json

Runs `torchrun --nproc_per_node N clear-dist generate --res R` with the embedded model, adds up the proportional set
sizes of all its processes every few seconds, and then compares rows of the picture: do they differ more where two
ranks' stripes meet than where tokens meet nearby?
"""

import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table

from benchmarks.lib.counts import TOKEN
from benchmarks.lib.flags import Parser, pixels, whole_number
from benchmarks.lib.machine import machine, save
from benchmarks.lib.processes import highest_memory

ROOT = Path(__file__).parents[2]
EVERY = 3.0
"""Seconds between looks at the processes' memory."""
BESIDE = 8
"""Token borders on either side that a rank border is compared with: rows differ more across token borders anywhere than
within tokens."""


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--res", type=pixels, default=8192)
    parser.add_argument("--ranks", type=whole_number, default=8)
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
    kept = {name: contents[name] for name in ("stripes", "seconds", "stages", "peak_memory_bytes")}
    save({"machine": machine(torch.device("cpu")), "command": flags, **figures, **kept}, arguments.json)


def measure(command: list[str]) -> dict[str, Any]:
    """Seconds of the whole command, and the highest memory of its processes together, in bytes."""
    began = time.time()
    process = subprocess.Popen(command)
    highest = highest_memory(process, EVERY)
    if process.returncode:
        raise SystemExit(process.returncode)
    return {"seconds_of_command": time.time() - began, "bytes_of_all_processes": highest}


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
