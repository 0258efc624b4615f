"""Does a rank's memory grow with its stripe, or with the image?  python benchmarks/memory.py [--json FILE] [--plot F]

Runs `clear-dist generate` with the embedded model for several sizes and numbers of ranks, and compares what its reports
say: images of twice the height on twice the ranks should cost each rank the same.
"""

import argparse
import json
import platform
from pathlib import Path
from typing import Any

from reports import report_of
from rich.console import Console
from rich.table import Table

MEGABYTE = 1e6


def measure(height: int, width: int, ranks: int, steps: int) -> dict[str, Any]:
    """One generation; the peaks, per rank, are high-water marks since loading."""
    size = ("--height", str(height), "--width", str(width), "--cascade", "off")
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=1024, help="pixels")
    parser.add_argument("--heights", type=int, nargs="+", default=[512, 1024, 2048], help="pixels")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    runs = [
        measure(height, arguments.width, ranks, arguments.steps)
        for ranks in arguments.ranks
        for height in arguments.heights
    ]
    show(runs)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps({"machine": platform.machine(), "runs": runs}, indent=1) + "\n")
    if arguments.plot is not None:
        plot(runs, arguments.plot)


def show(runs: list[dict[str, Any]]) -> None:
    table = Table("size", "ranks", "rows of tokens per rank", "peak MB, rank 0", "peak MB, highest of the others")
    for run in runs:
        first, *others = (peak / MEGABYTE for peak in run["peak_memory_bytes"])
        highest = f"{max(others):.0f}" if others else "-"
        size = f"{run['width']} x {run['height']}"
        table.add_row(size, str(run["ranks"]), str(run["rows_per_rank"]), f"{first:.0f}", highest)
    Console().print(table)


def plot(runs: list[dict[str, Any]], file: Path) -> None:
    """Peak against the height of the image, a line per number of ranks."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4))
    for ranks in sorted({run["ranks"] for run in runs}):
        mine = [run for run in runs if run["ranks"] == ranks]
        peaks = [max(run["peak_memory_bytes"]) / MEGABYTE for run in mine]
        axes.plot([run["height"] for run in mine], peaks, marker="o", label=f"{ranks} ranks")
    axes.set(xlabel="height of the image in pixels", ylabel="highest peak of a rank in MB")
    axes.legend()
    figure.savefig(file, dpi=120, bbox_inches="tight")


if __name__ == "__main__":
    main()
