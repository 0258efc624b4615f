"""What do guidance ranks gain: two halves with a pass each, on stripes twice as thick, against stripes of all ranks?

    python -m benchmarks.speed.guidance --json guidance.json

Runs `clear-dist generate` with the embedded model in one stage, guided; both ways take turns. A generation's first two
steps are left out: the first one plans and allocates, and with guidance ranks takes both passes on all ranks.
"""

from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.lib.flags import Parser, pixels, whole_number
from benchmarks.lib.machine import machine, save
from benchmarks.lib.reports import report_of

UNMEASURED = 2
WAYS = (1, 2)


def measure(size: int, ranks: int, steps: int, guidance_ranks: int) -> dict[str, Any]:
    """Seconds of one generation's measured steps, and bytes that a rank hands over in its last one, the most of all."""
    flags = {"res": size, "nproc": ranks, "steps": steps + UNMEASURED, "guidance-ranks": guidance_ranks}
    given = (word for name, value in flags.items() for word in (f"--{name}", str(value)))
    report = report_of(*given, "--text-attention", "exact", "--true-cfg-scale", "3")
    (stage,) = report["stages"]
    assert stage["guidance_ranks"] == guidance_ranks, "the model is guided"
    last = {name: max(rank[name][-1] for rank in report["comm"]) for name in report["comm"][0]}
    return {
        "guidance_ranks": guidance_ranks,
        "seconds_per_step": report["seconds_per_step"][UNMEASURED:],
        "halo_bytes_sent": last["halo_bytes_sent"],
        "join_bytes": last["join_bytes"],
    }


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--res", type=pixels, default=1024)
    parser.add_argument("--ranks", type=whole_number, default=4)
    parser.add_argument("--steps", type=whole_number, default=4, help="measured in each run")
    parser.add_argument("--repetitions", type=whole_number, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    how = arguments.res, arguments.ranks, arguments.steps
    runs = [measure(*how, ways) for _ in range(arguments.repetitions) for ways in WAYS]
    of_ways = {ways: [run for run in runs if run["guidance_ranks"] == ways] for ways in WAYS}
    steps = {
        ways: median(second for run in listed for second in run["seconds_per_step"]) for ways, listed in of_ways.items()
    }
    table = Table("guidance ranks", "stripes", "seconds a step", "MB of halos sent", "MB joined")
    for ways, (run, *_) in of_ways.items():
        sent = (f"{run[name] / 1e6:.2f}" for name in ("halo_bytes_sent", "join_bytes"))
        table.add_row(str(ways), str(arguments.ranks // ways), f"{steps[ways]:.3f}", *sent)
    Console(width=100).print(table)
    about = machine(torch.device("cpu"))
    save({"machine": about, "step_seconds": steps, "times_as_fast": steps[1] / steps[2], "runs": runs}, arguments.json)


if __name__ == "__main__":
    main()
