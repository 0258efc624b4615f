"""What would be gained if a stripe's tokens stayed in the order of 2D tiles through the whole transformer?

    python -m benchmarks.speed.tile_order --json tile_order.json

A backend that computes tile by tile copies its queries out of raster order in each layer and its results back. These
copies are timed alone, in turns with the attention of one layer by `tiled` and with a whole step; figures are medians.
Keys are left out: the rectangles around tiles overlap, so they are gathered in either order. `flex` copies keys and
values too: its bytes are counted, for FLUX.1-dev on a GPU of a stated bandwidth. The Triton kernel reads and writes
raster order by strides and copies nothing.
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.lib.counts import FLUX, TOKEN
from benchmarks.lib.flags import Parser, positive, whole_number
from benchmarks.lib.layer import Layer, image_attention, interleaved, make_layer
from benchmarks.lib.machine import machine, save
from benchmarks.lib.share import on_stripes
from benchmarks.lib.steps import SMALL, Candidate, make_pipeline, run_steps
from clear_dist.attention import BACKENDS
from clear_dist.attention.tiled import cpu_tiling
from clear_dist.comm.group import Group

CPU = torch.device("cpu")
SIDE = cpu_tiling(radius=8).side


def layer_of(side: int, text: int) -> Layer:
    """Random inputs for a layer of the small FLUX."""
    return make_layer(side, text=text, heads=SMALL.heads, head_dim=SMALL.head_dim, dtype=torch.float32, device=CPU)


def into_tiles(image_BRWND: Tensor) -> Tensor:
    """A copy in tile order, [B, rows of tiles, columns of tiles, SIDE, SIDE, N, D]."""
    return image_BRWND.unflatten(2, (-1, SIDE)).unflatten(1, (-1, SIDE)).transpose(2, 3).contiguous()


def out_of_tiles(tiles: Tensor, image_BRWND: Tensor) -> Tensor:
    return image_BRWND.unflatten(2, (-1, SIDE)).unflatten(1, (-1, SIDE)).transpose(2, 3).copy_(tiles)


def permutations(layer: Layer) -> Callable[[], Tensor]:
    """The copies of a layer: queries into tiles, results out of them."""
    query = layer.split(layer.query)[1]
    result = torch.empty_like(query)
    return lambda: out_of_tiles(into_tiles(query), result)


def in_a_layer(side: int, radius: int, text: int, options: argparse.Namespace) -> dict[str, Any]:
    layer = layer_of(side, text)
    attention = partial(image_attention, layer, radius, BACKENDS["tiled"])
    whole, copies = interleaved([attention, permutations(layer)], options.repetitions)
    return {"side": side, "radius": radius, "text": text, "seconds": whole, "copies_s": copies, "share": copies / whole}


def in_a_step(side: int, radius: int, options: argparse.Namespace) -> dict[str, Any]:
    """A step of the small FLUX on one rank, and its copies."""
    pipe, group = make_pipeline(SMALL, CPU, torch.float32), Group.create(CPU)
    layer = layer_of(side, text=0)
    prepare = partial(on_stripes, pipe, radius, "sync", group, attention_backend="tiled")
    whole, copies = [], []
    for _ in range(options.repetitions):
        with prepare() as ready:
            whole.append(run_steps(ready, SMALL.text_tokens, Candidate(prepare=prepare, side=side * TOKEN))[0])
        copies.append(SMALL.layers * interleaved([permutations(layer)], 1)[0])
    group.close()
    whole_s, copies_s = median(whole), median(copies)
    return {"side": side, "radius": radius, "seconds": whole_s, "copies_s": copies_s, "share": copies_s / whole_s}


def counted(pixels: int, bytes_per_second: float) -> dict[str, Any]:
    """Bytes that `flex` copies in a layer: queries, keys, values and output, each read and written once."""
    moved = 2 * 4 * (pixels // TOKEN) ** 2 * FLUX.channels * FLUX.itemsize
    return {"pixels": pixels, "bytes_per_layer": moved, "ms_per_layer": 1e3 * moved / bytes_per_second}


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--sides", type=whole_number, nargs="+", default=[64, 128], help=f"multiples of {SIDE} tokens")
    parser.add_argument("--radii", type=whole_number, nargs="+", default=[8, 16], help="in tokens")
    parser.add_argument("--texts", type=whole_number, nargs="+", default=[32, 512], help="text tokens, of a layer")
    parser.add_argument("--threads", type=whole_number, default=2)
    parser.add_argument("--repetitions", type=whole_number, default=5)
    parser.add_argument("--terabytes-per-second", type=positive, default=4.8, help="of the GPU; an H200's")
    parser.add_argument("--json", type=Path, help="where the report goes")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    sizes = [(side, radius) for side in options.sides for radius in options.radii]
    with torch.inference_mode():
        layers = [in_a_layer(*size, text, options) for size in sizes for text in options.texts]
    report = {
        "machine": machine(CPU),
        "layers": layers,
        "steps": [in_a_step(*size, options) for size in sizes],
        "flex_counted": [counted(pixels, 1e12 * options.terabytes_per_second) for pixels in (1024, 2048, 4096, 8192)],
    }
    for title in ("layers", "steps", "flex_counted"):
        table = Table(*report[title][0], title=title)
        for row in report[title]:
            table.add_row(*(f"{value:.3g}" for value in row.values()))
        Console().print(table)
    save(report, options.json)


if __name__ == "__main__":
    main()
