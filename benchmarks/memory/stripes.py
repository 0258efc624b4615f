"""Does a rank's memory grow with its stripe, or with the image?

    python -m benchmarks.memory.stripes --json memory.json --plot memory.png

Runs `clear-dist generate` with the embedded model for several sizes and numbers of ranks, and compares the peaks
in its reports: images of twice the height on twice the ranks should cost each rank the same.
"""

from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.lib.flags import Parser, pixels, whole_number
from benchmarks.lib.machine import machine, save
from benchmarks.lib.reports import MEGA, report_of


def measure(height: int, width: int, ranks: int, steps: int) -> dict[str, Any]:
    """One generation; each rank's peak is its high-water mark since loading."""
    size = ("--height", str(height), "--width", str(width))
    contents = report_of(*size, "--nproc", str(ranks), "--steps", str(steps))
    return {
        "height": height,
        "width": width,
        "ranks": ranks,
        "rows_per_rank": max(stop - start for start, stop in contents["stripes"]),
        "peak_memory_bytes": contents["peak_memory_bytes"],
        "seconds_per_step": contents["seconds_per_step"],
        "versions": contents["versions"],
    }


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--width", type=pixels, default=1024, help="in pixels")
    parser.add_argument("--heights", type=pixels, nargs="+", default=[512, 1024, 2048], help="in pixels")
    parser.add_argument("--ranks", type=whole_number, nargs="+", default=[1, 2, 4])
    parser.add_argument("--steps", type=whole_number, default=1)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    runs = [
        measure(height, arguments.width, ranks, arguments.steps)
        for ranks in arguments.ranks
        for height in arguments.heights
    ]
    show(runs)
    save({"machine": machine(torch.device("cpu")), "runs": runs}, arguments.json)
    if arguments.plot is not None:
        plot(runs, arguments.plot)


def show(runs: list[dict[str, Any]]) -> None:
    table = Table("size", "ranks", "rows of tokens per rank", "peak MB, rank 0", "peak MB, highest of the others")
    for run in runs:
        first, *others = (peak / MEGA for peak in run["peak_memory_bytes"])
        highest = f"{max(others):.0f}" if others else "-"
        size = f"{run['width']} x {run['height']}"
        table.add_row(size, str(run["ranks"]), str(run["rows_per_rank"]), f"{first:.0f}", highest)
    Console().print(table)


def plot(runs: list[dict[str, Any]], file: Path) -> None:
    """Peak over the height of the image, a line for each number of ranks."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4))
    for ranks in sorted({run["ranks"] for run in runs}):
        mine = [run for run in runs if run["ranks"] == ranks]
        peaks = [max(run["peak_memory_bytes"]) / MEGA for run in mine]
        axes.plot([run["height"] for run in mine], peaks, marker="o", label=f"{ranks} ranks")
    axes.set(xlabel="height of the image in pixels", ylabel="highest peak of a rank in MB")
    axes.legend()
    figure.savefig(file, dpi=120, bbox_inches="tight")


if __name__ == "__main__":
    main()
