"""How much faster are circles than full attention, and is the cost of a token independent of the image?

    python benchmarks/attention.py --json benchmarks/results/2026-11-21-cpu/attention.json

Each ratio comes from one process in which the candidates take turns, so that a busy machine slows both alike; times
are medians. Full attention is PyTorch's own, unmasked, over the same queries and keys.

Shape suffixes: B batch, R rows, W columns, N heads, T text tokens, D head dim.
"""

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from clear_dist.attention import Backend, choose_backend, window_attention

Image = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
"""Query, key, value [B, R, W, N, D], text key, text value [B, T, N, D]."""


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    backend = choose_backend(options.backend, device=device, dtype=dtype, head_dim=options.head_dim)
    report: dict[str, Any] = {"settings": vars(options) | {"backend": backend.name}, "machine": machine(device)}
    with torch.inference_mode():
        report["against_full"] = [
            against_full(make_image(side, options), radius, backend, options.repetitions)
            for side in options.sides
            for radius in options.radii
        ]
        report["per_token"] = [per_token(radius, backend, options) for radius in options.radii]
    show(report)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report, indent=2, default=str) + "\n")


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--text", type=int, default=32, help="text tokens")
    parser.add_argument("--radii", type=int, nargs="+", default=[8, 16], help="in tokens")
    parser.add_argument("--sides", type=int, nargs="+", default=[64, 128], help="square images, in tokens")
    parser.add_argument("--large-side", type=int, default=512, help="compared per token with the last of --sides")
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--json", type=Path, help="where the report goes")
    return parser.parse_args()


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures were measured on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
    return {
        "device": f"{device.type} ({name})",
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def make_image(side: int, options: argparse.Namespace) -> Image:
    """Random inputs for a square image of `side` tokens."""
    tail = (options.heads, options.head_dim)
    shapes = [(1, side, side, *tail)] * 3 + [(1, options.text, *tail)] * 2
    tensors = (torch.randn(shape, device=options.device).to(getattr(torch, options.dtype)) for shape in shapes)
    query, key, value, key_text, value_text = tensors
    return query, key, value, key_text, value_text


def full(image: Image) -> Tensor:
    """Attention of every image query to every key, without a mask."""
    query, key, value, key_text, value_text = image
    keys, values = torch.cat([key_text, key.flatten(1, 2)], 1), torch.cat([value_text, value.flatten(1, 2)], 1)
    return scaled_dot_product_attention(
        query.flatten(1, 2).transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2)
    )


def window(image: Image, radius: int, backend: Backend) -> Tensor:
    """CLEAR's attention of the same queries."""
    return window_attention(*image, radius=radius, row_offset=0, backend=backend)[0]


def interleaved(candidates: list[Callable[[], Tensor]], repetitions: int) -> list[float]:
    """Median seconds of each candidate; they take turns, after one warm-up run each."""
    for candidate in candidates:
        candidate()
    rounds = [[seconds(candidate) for candidate in candidates] for _ in range(repetitions)]
    return [median(times) for times in zip(*rounds, strict=True)]


def seconds(candidate: Callable[[], Tensor]) -> float:
    """Wall time of one run, the GPU's queue emptied before and after."""
    synchronize = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    synchronize()
    start = time.perf_counter()
    candidate()
    synchronize()
    return time.perf_counter() - start


def against_full(image: Image, radius: int, backend: Backend, repetitions: int) -> dict[str, float]:
    """Seconds of full attention and of the window's, and how many times faster that is."""
    whole, circle = interleaved([lambda: full(image), lambda: window(image, radius, backend)], repetitions)
    side = image[0].shape[1]
    return {"side": side, "radius": radius, "full_s": whole, "window_s": circle, "speedup": whole / circle}


def per_token(radius: int, backend: Backend, options: argparse.Namespace) -> dict[str, float]:
    """Seconds per token in a large image and in a small one, and their ratio."""
    sides = options.sides[-1], options.large_side
    images = [make_image(side, options) for side in sides]
    times = interleaved([lambda image=image: window(image, radius, backend) for image in images], options.repetitions)
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
    """Print the report as tables."""
    settings, console = report["settings"], Console()
    console.print(f"{report['machine']}; backend {settings['backend']}, {settings['dtype']}")
    console.print(f"{settings['heads']} heads of {settings['head_dim']}, {settings['text']} text tokens")
    for title, rows in (("Against full attention", "against_full"), ("Cost of a token", "per_token")):
        table = Table(*report[rows][0], title=title)
        for row in report[rows]:
            table.add_row(*(f"{value:.3g}" for value in row.values()))
        console.print(table)


if __name__ == "__main__":
    main()
