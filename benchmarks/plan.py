"""Is a plan's memory what `clear-dist generate` takes on a CPU?  python benchmarks/plan.py [--json FILE]

Draws with the embedded model, in one stage, for several sizes and numbers of ranks. Each rank's high-water mark, from
the report, stands beside its planned peak; the sum of all processes' proportional set sizes, looked at several times a
second, beside what the check before `generate` takes for all ranks together.
"""

import json
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from large import family, proportional_set_size
from machine import Parser, machine, pixels, whole_number
from reports import COMMAND
from rich.console import Console
from rich.table import Table

from clear_dist.commands.plan import planned_for
from clear_dist.request.flags import PlanFlags

EVERY = 0.2
"""Seconds."""
MB = 1e6


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--res", type=pixels, nargs="+", default=[512, 1024, 1536])
    parser.add_argument("--ranks", type=whole_number, nargs="+", default=[1, 2, 4])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows = [compared(res, ranks) for ranks in arguments.ranks for res in arguments.res]
    show(rows)
    if arguments.json is not None:
        contents = {"machine": machine(torch.device("cpu")), "rows": rows}
        arguments.json.write_text(json.dumps(contents, indent=1) + "\n")


def compared(res: int, ranks: int) -> dict[str, Any]:
    """One generation and its plan, in bytes."""
    plan = planned_for(PlanFlags(model="demo", gpu="cpu", res=res, nproc=ranks, cascade="off"))
    peaks, together = measured(res, ranks)
    return {
        "res": res,
        "ranks": ranks,
        "planned": [memory.peak for memory in plan.ranks],
        "planned_phase": [memory.largest.name for memory in plan.ranks],
        "measured": peaks,
        "planned_together": plan.needed,
        "measured_together": together,
    }


def measured(res: int, ranks: int) -> tuple[list[int], int]:
    """The peak of each rank since it has loaded, and the highest sum over all processes."""
    with tempfile.TemporaryDirectory() as folder:
        report, picture = Path(folder) / "report.json", Path(folder) / "picture.png"
        flags = ("--res", str(res), "--nproc", str(ranks), "--steps", "2", "--cascade", "off", "--seed", "0")
        files = ("--report", str(report), "--output", str(picture))
        process = subprocess.Popen(
            [*COMMAND, "generate", "--model", "demo", "--device", "cpu", *flags, *files],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        highest = 0
        while process.poll() is None:
            highest = max(highest, sum(map(proportional_set_size, family(process.pid))))
            time.sleep(EVERY)
        if process.returncode:
            raise SystemExit(process.returncode)
        return json.loads(report.read_text())["peak_memory_bytes"], highest


def show(rows: list[dict[str, Any]]) -> None:
    table = Table(
        "px",
        "ranks",
        "MB planned, rank 0",
        "measured",
        "the highest other, planned",
        "measured",
        "all, planned",
        "measured",
    )
    for row in rows:
        first = [row[name][0] for name in ("planned", "measured")]
        others = [max(row[name][1:], default=0) for name in ("planned", "measured")]
        amounts = (*first, *others, row["planned_together"], row["measured_together"])
        table.add_row(str(row["res"]), str(row["ranks"]), *(f"{amount / MB:.0f}" for amount in amounts))
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
