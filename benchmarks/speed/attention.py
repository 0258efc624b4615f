"""How much faster are circles than full attention, and is the cost of a token independent of the image?

    python -m benchmarks.speed.attention --json attention.json

One layer's attention on one rank: text queries see everything, image queries see the text and their circle. Beside it,
over the same queries and keys: full attention, unmasked, by PyTorch; and CLEAR in raster order by compiled
FlexAttention, as the official code has it (lib/row_major.py; on a CPU it compiles for half a minute for each size and
radius). Each ratio comes from one process in which the candidates take turns, so that a busy machine slows all alike;
times are medians.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.lib.flags import Parser, whole_number
from benchmarks.lib.layer import Layer, full, interleaved, make_layer, row_major, window
from benchmarks.lib.machine import machine, save
from clear_dist.attention import Backend, choose_backend
from clear_dist.observe.peaks import keep_for_the_next_layer


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    keep_for_the_next_layer(torch.device(options.device))
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    backend = choose_backend(options.backend, device=device, dtype=dtype, head_dim=options.head_dim)
    report: dict[str, Any] = {"machine": machine(device), "settings": vars(options) | {"backend": backend.name}}
    del report["settings"]["json"]
    with torch.inference_mode():
        report["against_others"] = [
            against_others(layer_of(side, options), radius, backend, options)
            for side in options.sides
            for radius in options.radii
        ]
        report["per_token"] = [per_token(radius, backend, options) for radius in options.radii]
    show(report)
    save(report, options.json)


def arguments() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cuda", "cpu"))
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--threads", type=whole_number, default=2)
    parser.add_argument("--heads", type=whole_number, default=2)
    parser.add_argument("--head-dim", type=whole_number, default=64)
    parser.add_argument("--text", type=whole_number, default=32, help="text tokens")
    parser.add_argument("--radii", type=whole_number, nargs="+", default=[8, 16], help="in tokens")
    parser.add_argument("--sides", type=whole_number, nargs="+", default=[64, 128], help="square images, in tokens")
    parser.add_argument("--large-side", type=whole_number, default=512, help="compared per token with the last side")
    parser.add_argument("--row-major", action=argparse.BooleanOptionalAction, default=True, help="the official layout")
    parser.add_argument("--repetitions", type=whole_number, default=7)
    parser.add_argument("--json", type=Path, help="where the report goes")
    return parser.parse_args()


def layer_of(side: int, options: argparse.Namespace) -> Layer:
    return make_layer(
        side,
        text=options.text,
        heads=options.heads,
        head_dim=options.head_dim,
        dtype=getattr(torch, options.dtype),
        device=torch.device(options.device),
    )


def against_others(layer: Layer, radius: int, backend: Backend, options: argparse.Namespace) -> dict[str, float]:
    """Seconds of each way, and how many times faster the window is."""
    candidates = [lambda: window(layer, radius, backend), lambda: full(layer)]
    if options.row_major:
        candidates.append(row_major(layer, radius))
    circle, whole, *raster = interleaved(candidates, options.repetitions)
    row = {"side": layer.side, "radius": radius, "window_s": circle, "full_s": whole, "full / window": whole / circle}
    if options.row_major:
        row |= {"row_major_s": raster[0], "row_major / window": raster[0] / circle}
    return row


def per_token(radius: int, backend: Backend, options: argparse.Namespace) -> dict[str, float]:
    """Seconds per token in a large image and in a small one, and their ratio."""
    sides = options.sides[-1], options.large_side
    layers = [layer_of(side, options) for side in sides]
    times = interleaved([lambda layer=layer: window(layer, radius, backend) for layer in layers], options.repetitions)
    small, large = (taken / side**2 for taken, side in zip(times, sides, strict=True))
    return {
        "radius": radius,
        "small_side": sides[0],
        "large_side": sides[1],
        "small_us_per_token": small * 1e6,
        "large_us_per_token": large * 1e6,
        "ratio": large / small,
    }


def show(report: dict[str, Any]) -> None:
    settings, console = report["settings"], Console()
    console.print(f"{report['machine']['device']}; backend {settings['backend']}, {settings['dtype']}")
    console.print(f"{settings['heads']} heads of {settings['head_dim']}, {settings['text']} text tokens")
    for title, rows in (("Against the others", "against_others"), ("Cost of a token", "per_token")):
        table = Table(*report[rows][0], title=title)
        for row in report[rows]:
            table.add_row(*(f"{value:.3g}" for value in row.values()))
        console.print(table)


if __name__ == "__main__":
    main()
