"""Is a step as fast as it was before a change?

    python -m benchmarks.speed.before_after CHECKOUT --json before_after.json

Draws with the embedded model, at 64 x 64 tokens on 2 ranks or as told, alternately from another checkout and from this
one, and compares the seconds of a step that their reports give: medians, and the ratio of each pair of runs. The first
step of a run is left out, since it plans and allocates. `--res 8192x1024 --nproc 1` is a rank's stripe of 8192 px on 8.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

import torch

from benchmarks.lib.flags import Parser, whole_number
from benchmarks.lib.machine import machine, save

HERE = Path(__file__).parents[2]
DRAW = ["--cascade", "off", "--seed", "1", "--true-cfg-scale", "1"]


def seconds_per_step(checkout: Path, sizes: list[str], steps: int, folder: Path) -> float:
    """Median of one run's steps."""
    code = "from clear_dist.cli import main; main()"
    arguments = ["generate", *DRAW, *sizes, "--steps", str(steps + 1), "--report", "report.json"]
    environment = os.environ | {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, *arguments]
    subprocess.run(command, check=True, cwd=folder, env=environment, capture_output=True)
    return median(json.loads((folder / "report.json").read_text())["seconds_per_step"][1:])


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("checkout", type=Path, help="the tree before the change")
    parser.add_argument("--res", default="1024", help="in pixels")
    parser.add_argument("--nproc", default="2", help="ranks, of a thread each")
    parser.add_argument("--steps", type=whole_number, default=8)
    parser.add_argument("--repetitions", type=whole_number, default=5)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    sizes = ["--res", given.res, "--nproc", given.nproc]
    times: dict[str, list[float]] = {"before": [], "after": []}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(given.repetitions):
            for name, checkout in (("before", given.checkout.resolve()), ("after", HERE)):
                times[name].append(seconds_per_step(checkout, sizes, given.steps, Path(folder)))
    ratios = [after / before for before, after in zip(times["before"], times["after"], strict=True)]
    for name, seconds in times.items():
        print(f"{name}: {1e3 * median(seconds):.1f} ms a step ({min(seconds) * 1e3:.1f} to {max(seconds) * 1e3:.1f})")
    print(f"after / before: {median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})")
    save({"machine": machine(torch.device("cpu")), "seconds_per_step": times, "ratios": ratios}, given.json)


if __name__ == "__main__":
    main()
