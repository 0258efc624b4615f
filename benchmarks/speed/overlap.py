"""At which bandwidths does overlap, or the stale schedule, pay?

    python -m benchmarks.speed.overlap --json overlap.json --plot overlap.png

Ranks draw over slow links (lib/slow_link.py), in four ways that take turns:

    alone        nothing is sent but the ranks' agreement: the step's compute
    no overlap   sync, every message waited for where it is sent
    overlap      sync, as the engine does it
    stale        stale, as the engine does it

The model is FLUX with random weights, wide enough that most of the work is matrix products, as in the real one, and
that next to nothing is sent once a step. One thread a rank. Figures are medians of rank 0's steps without the first two
of each generation, which plan and allocate; waiting is the report's `seconds_waiting`. Where a link takes longer than
the compute, no schedule can hide all of it.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.lib import slow_link
from benchmarks.lib.flags import Parser, pixels, positive, whole_number

MODULE = "benchmarks.speed.overlap"
UNMEASURED = 2
"""Steps at the start of each generation."""
PROMPT = "sunset over green mountains, sun on the left, clear sky"


@dataclass(frozen=True)
class Way:
    name: str
    schedule: str
    change: Callable[[Any], None] = lambda striped: None
    """Change of the striped model after the first step."""


def parse_arguments() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--ranks", type=whole_number, default=2, help="at least 2")
    parser.add_argument("--res", type=pixels, default=768, help="height and width in pixels")
    parser.add_argument("--layers", type=whole_number, nargs=2, default=(4, 8), help="double and single blocks")
    parser.add_argument("--heads", type=whole_number, default=6, help="of 64 channels each")
    parser.add_argument("--text-attention", choices=("average", "exact"), default="average")
    parser.add_argument("--window", default="8", help="radius in tokens, or full")
    parser.add_argument("--megabits", type=whole_number, nargs="+", default=[25, 50, 100, 200, 400, 800])
    parser.add_argument("--latency", type=positive, default=0.1, help="one way, in milliseconds")
    parser.add_argument("--steps", type=whole_number, default=5, help="measured in each generation")
    parser.add_argument("--repetitions", type=whole_number, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    if arguments.ranks < 2:
        parser.error("--ranks must be at least 2, got 1; nearest: 2")
    if arguments.window != "full" and not arguments.window.isdigit():
        parser.error(f"--window must be a radius in tokens or full, got {arguments.window}")
    if arguments.plot is not None and not arguments.plot.parent.is_dir():
        parser.error(f"{arguments.plot} must lie in a folder that exists")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    if "RANK" not in os.environ:
        try:
            command = [sys.executable, "-m", MODULE, *sys.argv[1:]]
            raise SystemExit(slow_link.run(command, ranks=arguments.ranks))
        except KeyboardInterrupt:
            raise SystemExit(130) from None
    link = slow_link.join()
    rows = measure(arguments, link)
    if int(os.environ["RANK"]) == 0:
        show(rows, arguments)
        write(rows, arguments)
        if arguments.plot is not None:
            plot(rows, arguments.plot)


def measure(arguments: argparse.Namespace, link: slow_link.Link) -> list[dict[str, Any]]:
    """Seconds of steps and of waiting, for each bandwidth and way."""
    import torch

    from benchmarks.lib.silent import without_communication, without_overlap
    from clear_dist import demo
    from clear_dist.comm.group import Group
    from clear_dist.families.flux.card import CARD
    from clear_dist.weights import loading

    torch.set_num_threads(1)
    group = Group.create("cpu")
    pipe = loading.load_pipeline(demo.WEIGHTS, CARD, with_text_encoders=True, dtype=torch.float32, device=group.device)
    pipe.register_modules(transformer=random_transformer(pipe.transformer.config, arguments))
    ways = (
        Way("alone", "sync", without_communication),
        Way("no overlap", "sync", without_overlap),
        Way("overlap", "sync"),
        Way("stale", "stale"),
    )
    rows = []
    for megabits in arguments.megabits:
        group.barrier()
        if group.rank == 0:
            link.set(bandwidth=megabits * 1e6 / 8, latency=arguments.latency / 1e3)
        group.barrier()
        drawn = [
            {way.name: generate(pipe, group, way, arguments) for way in ways} for _ in range(arguments.repetitions)
        ]
        times = {way.name: [run[way.name] for run in drawn] for way in ways}
        rows.append({"megabits": megabits, **summary(times), "runs": times})
    group.close()
    return rows


def random_transformer(embedded: Any, arguments: argparse.Namespace) -> Any:
    """A transformer larger than the embedded model's, equal on all ranks."""
    import torch
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    double, single = arguments.layers
    sizes = {"num_layers": double, "num_single_layers": single, "num_attention_heads": arguments.heads}
    heads = {"attention_head_dim": 64, "axes_dims_rope": (16, 24, 24)}
    return FluxTransformer2DModel.from_config({**embedded, **sizes, **heads}).eval()


def generate(pipe: Any, group: Any, way: Way, arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds, bytes sent and waiting of one generation's measured steps."""
    import torch

    from clear_dist import demo, parallelize
    from clear_dist.engine.striped import striped_of

    full = arguments.window == "full"
    handle = parallelize(
        pipe,
        window="full" if full else int(arguments.window),
        text_attention="exact" if full else arguments.text_attention,
        schedule=way.schedule,
        warmup_steps=0,
        group=group,
    )
    ends: list[float] = []

    def end_step(pipeline: Any, step: int, _: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if step == 0:
            way.change(striped_of(pipeline.transformer))
        ends.append(time.perf_counter())
        return {}

    with torch.inference_mode():
        pipe(
            PROMPT,
            height=arguments.res,
            width=arguments.res,
            num_inference_steps=UNMEASURED + arguments.steps,
            max_sequence_length=demo.DEFAULT_MAX_SEQUENCE_LENGTH,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
            callback_on_step_end=end_step,
        )
    counted = {name: values[UNMEASURED:] for name, values in handle.counters.as_dict().items()}
    handle.undo()
    seconds = [after - before for before, after in pairwise(ends)][UNMEASURED - 1 :]
    return {"seconds": seconds, **counted}


def summary(runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Each way's median step and waiting, and how much less it waits than without overlap."""
    step, waiting = (
        {name: median(second for run in listed for second in run[key]) for name, listed in runs.items()}
        for key in ("seconds", "seconds_waiting")
    )
    without = waiting["no overlap"]
    return {
        "step_seconds": step,
        "waiting_seconds": waiting,
        "waiting_share": without / step["no overlap"],
        "removed": {name: 1 - waiting[name] / without for name in ("overlap", "stale")},
    }


def show(rows: list[dict[str, Any]], arguments: argparse.Namespace) -> None:
    table = Table(
        title=f"{arguments.ranks} ranks, {arguments.res} px, {arguments.latency:g} ms, window {arguments.window}",
        caption="seconds per step; how much of it is waiting without overlap, and how much of that is removed",
    )
    for title in ("Mbit/s", "alone", "no overlap", "waits", "overlap", "removes", "stale", "removes"):
        table.add_column(title, justify="right", no_wrap=True)
    for row in rows:
        step, removed = row["step_seconds"], row["removed"]
        table.add_row(
            f"{row['megabits']:g}",
            f"{step['alone']:.2f}",
            f"{step['no overlap']:.2f}",
            f"{row['waiting_share']:.0%}",
            f"{step['overlap']:.2f}",
            f"{removed['overlap']:.0%}",
            f"{step['stale']:.2f}",
            f"{removed['stale']:.0%}",
        )
    Console(width=100).print(table)


def write(rows: list[dict[str, Any]], arguments: argparse.Namespace) -> None:
    import torch

    from benchmarks.lib.machine import machine, save

    settings = {name: value for name, value in vars(arguments).items() if name not in ("json", "plot")}
    save({"machine": machine(torch.device("cpu")), "settings": settings, "links": rows}, arguments.json)


def plot(rows: list[dict[str, Any]], file: Path) -> None:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    megabits = [row["megabits"] for row in rows]
    for name in rows[0]["step_seconds"]:
        axes.plot(megabits, [row["step_seconds"][name] for row in rows], marker="o", label=name)
    axes.set(xlabel="bandwidth of each rank's link, Mbit/s", ylabel="seconds per step", ylim=(0, None), xscale="log")
    axes.set_xticks(megabits, [f"{number:g}" for number in megabits])
    axes.minorticks_off()
    axes.legend()
    figure.savefig(file, dpi=120, bbox_inches="tight")


if __name__ == "__main__":
    main()
