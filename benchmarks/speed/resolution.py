"""What does a token cost as the image grows?

    python -m benchmarks.speed.resolution --json resolution.json --plot resolution.png

Runs `clear-dist generate` with the embedded model at several sizes, in one stage each, sizes taking turns, and divides
the median step by the number of tokens. CLEAR's window keeps that constant; with full attention it grows with the
number of tokens.
"""

from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.lib.counts import TOKEN
from benchmarks.lib.flags import Parser, pixels, whole_number
from benchmarks.lib.machine import machine, save
from benchmarks.lib.reports import report_of


def measure(size: int, ranks: int, steps: int) -> dict[str, Any]:
    """One generation of `size` x `size` pixels; its first step is left out, since it plans and allocates."""
    flags = ("--res", str(size), "--true-cfg-scale", "1", "--nproc", str(ranks))
    report = report_of(*flags, "--steps", str(steps + 1))
    seconds = report["seconds_per_step"][1:]
    return {
        "size": size,
        "ranks": ranks,
        "seconds_per_step": seconds,
        "microseconds_per_token": 1e6 * median(seconds) / (size // TOKEN) ** 2,
        "peak_memory_bytes": report["peak_memory_bytes"],
        "versions": report["versions"],
    }


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--sizes", type=pixels, nargs="+", default=[1024, 2048, 4096, 8192], help="in pixels")
    parser.add_argument("--ranks", type=whole_number, default=8)
    parser.add_argument("--steps", type=whole_number, default=2, help="measured in each run")
    parser.add_argument("--repetitions", type=whole_number, default=2)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    runs = [
        measure(size, arguments.ranks, arguments.steps)
        for _ in range(arguments.repetitions)
        for size in arguments.sizes
    ]
    costs = {
        size: median(run["microseconds_per_token"] for run in runs if run["size"] == size) for size in arguments.sizes
    }
    show(costs)
    about = machine(torch.device("cpu"))
    save({"machine": about, "microseconds_per_token": costs, "runs": runs}, arguments.json)
    if arguments.plot is not None:
        plot(costs, arguments.plot)


def show(costs: dict[int, float]) -> None:
    first = next(iter(costs.values()))
    table = Table("size", "tokens", "microseconds per token and step", "against the first")
    for size, cost in costs.items():
        table.add_row(f"{size} x {size}", str((size // TOKEN) ** 2), f"{cost:.1f}", f"{cost / first:.2f}")
    Console().print(table)


def plot(costs: dict[int, float], file: Path) -> None:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4))
    axes.plot(list(costs), list(costs.values()), marker="o")
    axes.set(xlabel="side of the image in pixels", ylabel="microseconds per token and step", ylim=(0, None))
    axes.set_xscale("log", base=2)
    figure.savefig(file, dpi=120, bbox_inches="tight")


if __name__ == "__main__":
    main()
