"""From which bandwidth on does overlap, or the stale schedule, pay?  python benchmarks/overlap.py [--json F] [--plot F]

Ranks draw over slow links (`slow_link.py`), in four ways that take turns:

    alone        nothing is sent but the ranks' agreement: what the step's compute takes
    no overlap   sync, every message waited for where it is sent
    overlap      sync, as the engine does it
    stale        stale, as the engine does it

The model is FLUX with random weights: wide enough that, as in the real one, most of the work is matrix products and
next to nothing is sent once per step. One thread a rank. Medians of steps, of rank 0; without the first two of each
generation, which plan and allocate. Waiting is what the report calls `seconds_waiting`. Where a link takes longer than
the compute, no schedule can hide all of it.
"""

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import slow_link
from rich.console import Console
from rich.table import Table

UNMEASURED = 2
"""Steps at the start of each generation."""
PROMPT = "sunset over green mountains, sun on the left, clear sky"


@dataclass(frozen=True)
class Way:
    name: str
    schedule: str
    change: Callable[[Any], None] = lambda striped: None
    """Done to the striped model after the first step."""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=at_least(2), default=2)
    parser.add_argument("--res", type=at_least(32), default=768, help="height and width in pixels")
    parser.add_argument("--layers", type=at_least(1), nargs=2, default=(4, 8), help="double and single blocks")
    parser.add_argument("--heads", type=at_least(1), default=6, help="of 64 channels each")
    parser.add_argument("--text-attention", choices=("average", "exact"), default="average")
    parser.add_argument("--window", default="8", help="radius in tokens, or full")
    parser.add_argument("--megabits", type=at_least(1), nargs="+", default=[25, 50, 100, 200, 400, 800])
    parser.add_argument("--latency", type=float, default=0.1, help="one way, in milliseconds")
    parser.add_argument("--steps", type=at_least(1), default=5, help="measured in each generation")
    parser.add_argument("--repetitions", type=at_least(1), default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    if arguments.res % 16:
        parser.error(f"--res must be a multiple of 16, got {arguments.res}")
    if arguments.window != "full" and not arguments.window.isdigit():
        parser.error(f"--window must be a radius in tokens or full, got {arguments.window}")
    for file in (arguments.json, arguments.plot):
        if file is not None and not file.parent.is_dir():
            parser.error(f"{file} must lie in a folder that exists")
    return arguments


def at_least(lowest: int) -> Callable[[str], int]:
    """A type for argparse."""

    def number(text: str) -> int:
        if not text.isdigit() or int(text) < lowest:
            raise argparse.ArgumentTypeError(f"must be a whole number of at least {lowest}, got {text}")
        return int(text)

    return number


def main() -> None:
    arguments = parse_arguments()
    if "RANK" not in os.environ:
        try:
            raise SystemExit(slow_link.run([sys.executable, *sys.argv], ranks=arguments.ranks))
        except KeyboardInterrupt:
            raise SystemExit(130) from None
    link = slow_link.join()
    rows = measure(arguments, link)
    if int(os.environ["RANK"]) == 0:
        show(rows, arguments)
        if arguments.json is not None:
            write(rows, arguments)
        if arguments.plot is not None:
            plot(rows, arguments.plot)


def measure(arguments: argparse.Namespace, link: slow_link.Link) -> list[dict[str, Any]]:
    """For each bandwidth the seconds of each way's steps, and of its waits as the report counts them."""
    import torch
    from silent import without_communication, without_overlap

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
    """A larger one than the embedded model's, equal on all ranks."""
    import torch
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    double, single = arguments.layers
    sizes = {"num_layers": double, "num_single_layers": single, "num_attention_heads": arguments.heads}
    heads = {"attention_head_dim": 64, "axes_dims_rope": (16, 24, 24)}
    return FluxTransformer2DModel.from_config({**embedded, **sizes, **heads}).eval()


def generate(pipe: Any, group: Any, way: Way, arguments: argparse.Namespace) -> dict[str, Any]:
    """One generation: the seconds of its measured steps, and what it sent and waited in them."""
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
            way.change(striped_of(pipeline))
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
    """For each way its median step and waiting, and how much of the waiting without overlap is gone."""
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
    from clear_dist.observe.report import versions

    contents = {
        "command": " ".join(["python", *sys.argv]),
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": versions(),
        "settings": {name: value for name, value in vars(arguments).items() if name not in ("json", "plot")},
        "links": rows,
    }
    arguments.json.write_text(json.dumps(contents, indent=1) + "\n")


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
