"""When is it faster to shard the text tokens over ranks than to replicate them?

    python -m benchmarks.speed.text_tokens --json text_tokens.json

Ranks draw with a FLUX of random weights, one thread each, with replicated and sharded text tokens in turns, so that
other work on the machine slows both alike. Medians of steps, of the slowest rank: wall time, and the time its thread
computed, without waiting. Beside them stands the fraction of a rank's tokens that are text where text is replicated,
by which `--text-tokens auto` chooses.
"""

import argparse
import time
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.lib.counts import TOKEN, Model
from benchmarks.lib.flags import Parser, pixels, whole_number
from benchmarks.lib.machine import machine, save
from benchmarks.lib.share import on_stripes
from benchmarks.lib.steps import draw, make_pipeline
from clear_dist.comm.group import Group
from clear_dist.launch import ranks as launch

WAYS = ("replicated", "sharded")
Times = dict[str, list[float]]


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--sides", type=pixels, nargs="+", default=[512, 768, 1024], help="of square images, in pixels")
    parser.add_argument("--ranks", type=whole_number, default=2)
    parser.add_argument("--text-tokens", type=whole_number, default=512)
    parser.add_argument("--text-attention", choices=("average", "exact"), default="exact")
    parser.add_argument("--blocks", type=whole_number, nargs=2, default=(1, 2), help="double and single")
    parser.add_argument("--heads", type=whole_number, default=8, help="of 64 channels each")
    parser.add_argument("--steps", type=whole_number, default=2, help="measured in each generation")
    parser.add_argument("--repetitions", type=whole_number, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    raise SystemExit(launch.run(partial(work, options), nproc=options.ranks, traceback=True))


def work(options: argparse.Namespace) -> None:
    """The work of each rank."""
    torch.set_num_threads(1)
    group = Group.create("cpu")
    double, single = options.blocks
    model = Model(
        double_blocks=double,
        single_blocks=single,
        heads=options.heads,
        head_dim=64,
        text_tokens=options.text_tokens,
        itemsize=4,
    )
    pipe = make_pipeline(model, group.device, torch.float32)
    rows = [measured(side, pipe, group, options) for side in options.sides]
    if group.rank == 0:
        show(rows, options)
        save({"machine": machine(group.device), "model": vars(model), "rows": rows}, options.json)
    group.close()


def measured(side: int, pipe: Any, group: Group, options: argparse.Namespace) -> dict[str, Any]:
    """All runs of one size, and their medians."""
    runs: dict[str, list[Times]] = {way: [] for way in WAYS}
    for _ in range(options.repetitions):
        for way in WAYS:
            settings = {"text_tokens": way, "text_attention": options.text_attention}
            with on_stripes(pipe, 8, "sync", group, **settings):
                runs[way].append(times_of_steps(pipe, side, options))
    everyone = group.gather_objects(runs)
    row: dict[str, Any] = {"side_px": side, "text_part": part_of(side, options)}
    for way in WAYS:
        for name in ("wall", "computing"):
            seconds = [median([second for run in theirs[way] for second in run[name]]) for theirs in everyone]
            row[f"{way}, {name}"] = max(seconds)
    return row | {"runs": everyone}


def times_of_steps(pipe: Any, side: int, options: argparse.Namespace) -> Times:
    """Seconds of one generation's steps but the first, which plans and allocates."""
    times: Times = {"wall": [], "computing": []}

    def end_step() -> None:
        times["wall"].append(time.perf_counter())
        times["computing"].append(time.thread_time())

    draw(pipe, options.text_tokens, side, options.steps + 1, end_step)
    return {name: [end - begin for begin, end in pairwise(ends)] for name, ends in times.items()}


def part_of(side: int, options: argparse.Namespace) -> float:
    """Fraction of a rank's tokens that are text where text is replicated."""
    return options.text_tokens / (options.text_tokens + (side // TOKEN) ** 2 / options.ranks)


def show(rows: list[dict[str, Any]], options: argparse.Namespace) -> None:
    table = Table(title=f"seconds per step, {options.ranks} ranks, {options.text_tokens} text tokens")
    for column in ("px", "text", *(f"{way}, {name}" for name in ("wall", "computing") for way in (*WAYS, "gain"))):
        table.add_column(column, justify="right")
    for row in rows:
        cells = [str(row["side_px"]), f"{row['text_part']:.0%}"]
        for name in ("wall", "computing"):
            before, after = (row[f"{way}, {name}"] for way in WAYS)
            cells += [f"{before:.3f}", f"{after:.3f}", f"{before / after:.2f}"]
        table.add_row(*cells)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
