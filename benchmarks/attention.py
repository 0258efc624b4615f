"""How much faster are circles than full attention, and is the cost of a token independent of the image?

    python benchmarks/attention.py --row-major --json attention.json

One layer's attention, as one rank computes it: text queries see everything, image queries the text and their circle.
Beside it, over the same queries and keys: full attention, unmasked, by PyTorch; and CLEAR in raster order by compiled
FlexAttention, as the official code has it (row_major.py; half a minute of compiling for each size and radius on a CPU).
Each ratio comes from one process in which the candidates take turns, so that a busy machine slows all alike; times are
medians.

Shape suffixes: B batch, L text and image tokens, R rows, W columns, N heads, T text tokens, D head dim.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from machine import Parser, machine, save, whole_number
from rich.console import Console
from rich.table import Table
from row_major import row_major_attention, row_major_mask
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from clear_dist.attention import Backend, attend, choose_backend, window_attention
from clear_dist.attention.backend import CallShape

SHORTEST = 0.02
"""Seconds: what takes less is timed several times in a row."""


@dataclass(frozen=True, kw_only=True)
class Layer:
    """Random inputs for a square image of `side` tokens."""

    query: Tensor
    """[B, L, N, D] as `key` and `value`, text tokens first."""
    key: Tensor
    value: Tensor
    side: int
    text: int

    def request(self, radius: int) -> CallShape:
        """What backends are asked."""
        heads, head_dim = self.query.shape[2:]
        sizes = self.side, self.side, self.side, self.text, radius
        return CallShape(self.query.device.type, self.query.dtype, head_dim, heads, *sizes)

    def split(self, x_BLND: Tensor) -> tuple[Tensor, Tensor]:
        """Views [B, T, N, D] and [B, R, W, N, D]."""
        return x_BLND[:, : self.text], x_BLND[:, self.text :].unflatten(1, (self.side, self.side))


def make_layer(side: int, *, text: int, heads: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> Layer:
    shape = (1, text + side**2, heads, head_dim)
    query, key, value = (torch.randn(shape, device=device, dtype=dtype) for _ in range(3))
    return Layer(query=query, key=key, value=value, side=side, text=text)


def full(layer: Layer) -> Tensor:
    """Attention of every query to every key, without a mask."""
    query, key, value = (x.transpose(1, 2) for x in (layer.query, layer.key, layer.value))
    return scaled_dot_product_attention(query, key, value).transpose(1, 2)


def window(layer: Layer, radius: int, backend: Backend) -> Tensor:
    """CLEAR's attention of the same queries, as `clear_dist.models.joint_attention` computes it on one rank."""
    output = torch.empty_like(layer.query)
    output_text, output_image = layer.split(output)
    output_text.copy_(attend(layer.split(layer.query)[0], layer.key, layer.value)[0])
    output_image.copy_(image_attention(layer, radius, backend))
    return output


def image_attention(layer: Layer, radius: int, backend: Backend) -> Tensor:
    """That of the image queries alone [B, R, W, N, D]."""
    (_, query), (text_key, key), (text_value, value) = (layer.split(x) for x in (layer.query, layer.key, layer.value))
    return window_attention(query, key, value, text_key, text_value, radius=radius, row_offset=0, backend=backend)[0]


def row_major(layer: Layer, radius: int) -> Callable[[], Tensor]:
    """The same by the official code's means; its mask is made here, the kernel compiled at the first call."""
    mask = row_major_mask((layer.side, layer.side), layer.text, radius, layer.query.device)
    return lambda: row_major_attention(layer.query, layer.key, layer.value, mask)


def interleaved(candidates: list[Callable[[], Tensor]], repetitions: int) -> list[float]:
    """Median seconds of each candidate; they take turns, after two warm-up runs each."""
    calls = []
    for candidate in candidates:
        candidate()
        calls.append(max(1, round(SHORTEST / seconds(candidate))))
    rounds = [
        [seconds(candidate, times) for candidate, times in zip(candidates, calls, strict=True)]
        for _ in range(repetitions)
    ]
    return [median(times) for times in zip(*rounds, strict=True)]


def seconds(candidate: Callable[[], Tensor], calls: int = 1) -> float:
    """Wall time of one of several calls in a row, the GPU's queue emptied before and after."""
    synchronize = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        candidate()
    synchronize()
    return (time.perf_counter() - start) / calls


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
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
    """The command line."""
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
    """Seconds of each, and how many times faster the window's are."""
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
    """Print the report as tables."""
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
