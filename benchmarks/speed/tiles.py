"""How large should the tiles of `tiled` be on a CPU, and from how many text tokens does their own call pay?

    python -m benchmarks.speed.tiles --json benchmarks/results/2026-11-29-cpu/tiles.json

Times the attention of the image queries of one layer by tiles of each size, with the text behind each tile's keys and
apart, and full attention of all queries beside it. Candidates take turns; figures are medians.
`clear_dist.attention.tiled.cpu_tiling` is chosen by the answer.
"""

from functools import partial
from itertools import product
from pathlib import Path
from sys import maxsize
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.lib.flags import Parser, whole_number
from benchmarks.lib.layer import full, image_attention, interleaved, make_layer
from benchmarks.lib.machine import machine, save
from clear_dist.attention import Backend, tiled

MIB = 2**20


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--sides", type=whole_number, nargs="+", default=[64, 128], help="square images, in tokens")
    parser.add_argument("--radii", type=whole_number, nargs="+", default=[8, 16, 32], help="in tokens")
    parser.add_argument("--texts", type=whole_number, nargs="+", default=[32, 128, 512], help="text tokens")
    parser.add_argument("--tiles", type=whole_number, nargs="+", default=[8, 16], help="rows and columns of a tile")
    parser.add_argument("--heads", type=whole_number, default=2)
    parser.add_argument("--head-dim", type=whole_number, default=64)
    parser.add_argument("--threads", type=whole_number, default=2)
    parser.add_argument("--repetitions", type=whole_number, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    rows = []
    shown = Table("tokens", "radius", "text", "ms")
    for side, radius, text in product(options.sides, options.radii, options.texts):
        layer = make_layer(
            side,
            text=text,
            heads=options.heads,
            head_dim=options.head_dim,
            dtype=torch.float32,
            device=torch.device("cpu"),
        )
        ways = {f"{tile}, {way}": tiles_of(tile, way) for tile, way in product(options.tiles, ("behind", "apart"))}
        candidates: list[Any] = [partial(image_attention, layer, radius, backend) for backend in ways.values()]
        with torch.inference_mode():
            times = interleaved([*candidates, partial(full, layer)], options.repetitions)
        seconds = dict(zip([*ways, "full"], times, strict=True))
        rows.append({"side": side, "radius": radius, "text": text, "seconds": seconds})
        listed = ", ".join(f"{name} {1e3 * taken:.3g}" for name, taken in seconds.items())
        shown.add_row(f"{side} x {side}", str(radius), str(text), listed)
    Console().print(shown)
    save({"machine": machine(torch.device("cpu")), "rows": rows}, options.json)


def tiles_of(side: int, way: str) -> Backend:
    """`tiled` with tiles of `side`, the text behind their keys or apart."""
    tiling = tiled.Tiling(side, 8 * MIB, text_apart=1 if way == "apart" else maxsize)
    return Backend("tiled", tiled.why_not, partial(tiled.run_in, tiling=tiling))


if __name__ == "__main__":
    main()
