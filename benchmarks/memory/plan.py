"""Is the memory that a plan predicts what `clear-dist generate` takes on a CPU?

    python -m benchmarks.memory.plan --json plan.json

Draws with the embedded model, in one stage, for several sizes and numbers of ranks. Each rank's high-water mark, from
the report, stands beside its planned peak; the sum of all processes' proportional set sizes, read several times a
second, stands beside what the check before `generate` takes for all ranks together.
"""

from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.lib.flags import Parser, pixels, whole_number
from benchmarks.lib.machine import machine, save
from benchmarks.lib.reports import MEGA, report_of
from clear_dist.commands.plan import planned_for
from clear_dist.request.flags import PlanFlags

EVERY = 0.2
"""Seconds between looks at the processes' memory."""


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--res", type=pixels, nargs="+", default=[512, 1024, 1536])
    parser.add_argument("--ranks", type=whole_number, nargs="+", default=[1, 2, 4])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows = [compared(res, ranks) for ranks in arguments.ranks for res in arguments.res]
    show(rows)
    save({"machine": machine(torch.device("cpu")), "rows": rows}, arguments.json)


def compared(res: int, ranks: int) -> dict[str, Any]:
    """One generation and its plan, in bytes."""
    plan = planned_for(PlanFlags(model="demo", gpu="cpu", res=res, nproc=ranks, cascade="off"))
    report = report_of("--res", str(res), "--nproc", str(ranks), "--steps", "2", every=EVERY)
    return {
        "res": res,
        "ranks": ranks,
        "planned": [memory.peak for memory in plan.ranks],
        "planned_phase": [memory.largest.name for memory in plan.ranks],
        "measured": report["peak_memory_bytes"],
        "planned_together": plan.needed,
        "measured_together": report["bytes_of_all_processes"],
    }


def show(rows: list[dict[str, Any]]) -> None:
    amounts = ("MB planned, rank 0", "the highest other, planned", "all, planned")
    table = Table("px", "ranks", *(title for planned in amounts for title in (planned, "measured")))
    for row in rows:
        first = [row[name][0] for name in ("planned", "measured")]
        others = [max(row[name][1:], default=0) for name in ("planned", "measured")]
        bytes_of = (*first, *others, row["planned_together"], row["measured_together"])
        table.add_row(str(row["res"]), str(row["ranks"]), *(f"{amount / MEGA:.0f}" for amount in bytes_of))
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
