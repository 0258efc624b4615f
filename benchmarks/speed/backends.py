"""Which attention backend is the fastest for which shape? `--attention-backend auto` chooses by the answer.

    python -m benchmarks.speed.backends --json benchmarks/results/2026-11-21-cpu/backends.json
    python -m benchmarks.speed.backends --table

The first command times one call of windowed attention, whose keys are the queries' own rows and the text, with every
backend that can run; backends take turns, figures are medians. The second writes clear_dist/attention/measured.json
from all results in benchmarks/results: from files of the first, and from the `kernels.json` of gpu/suite.py, whose
calls include the attention of text queries.
"""

import argparse
import json
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.lib.flags import Parser, whole_number
from benchmarks.lib.layer import interleaved
from benchmarks.lib.machine import machine, save
from clear_dist.attention import BACKENDS, window_attention
from clear_dist.attention.backend import CallShape
from clear_dist.attention.measured import TABLE
from clear_dist.observe.peaks import keep_for_the_next_layer

RESULTS = Path(__file__).parents[1] / "results"
FILES = ("backends.json", "kernels.json")
SHAPES = {
    "cpu": ("8x16", "16x16", "8x32", "16x32", "32x32", "8x64", "16x64", "32x64", "48x48", "64x64", "16x128", "128x128"),
    "cuda": ("8x64", "16x128", "32x256", "64x512", "64x64", "128x128", "256x256", "512x512"),
}
"""Stripes of 8 ranks, and whole images."""
HEADS = {"cpu": 4, "cuda": 24}
CANDIDATES = {"cpu": ("tiled", "masked"), "cuda": tuple(name for name in BACKENDS if name != "reference")}
"""Backends worth timing; on a CPU the others are for tests."""


def main() -> None:
    options = arguments()
    if options.table:
        TABLE.write_text(table_of(results()))
        return
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    keep_for_the_next_layer(torch.device(options.device))
    sizes = product(options.shapes, options.radii, options.texts, options.head_dims)
    report: dict[str, Any] = {"machine": machine(torch.device(options.device)), "rows": []}
    shown = Table("tokens", "radius", "text", "head dim", "ms")
    for shape, radius, text, head_dim in sizes:
        with torch.inference_mode():
            row = timed(shape, radius, text, head_dim, options)
        report["rows"].append(row)
        times = ", ".join(f"{name} {1e3 * row['seconds'][name]:.3g}" for name in fastest_first(row))
        shown.add_row(f"{shape[0]} x {shape[1]}", str(radius), str(text), str(head_dim), times)
    Console().print(shown)
    save(report, options.json)


def arguments() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--table", action="store_true", help="write the table from all results")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cuda", "cpu"))
    parser.add_argument("--backends", choices=list(BACKENDS), nargs="+", help="instead of all that can run")
    parser.add_argument("--shapes", type=rows_and_columns, nargs="+", help="in tokens, for instance 8x64")
    parser.add_argument("--radii", type=whole_number, nargs="+", default=[8, 16, 32], help="in tokens")
    parser.add_argument("--texts", type=whole_number, nargs="+", default=[32, 512], help="text tokens")
    parser.add_argument("--head-dims", type=whole_number, nargs="+", help="32 and 64 on a CPU, 128 on CUDA")
    parser.add_argument("--threads", type=whole_number, default=2, help="on a CPU")
    parser.add_argument("--repetitions", type=whole_number, default=5)
    parser.add_argument("--json", type=Path, help="where the report goes")
    options = parser.parse_args()
    options.shapes = options.shapes or [rows_and_columns(shape) for shape in SHAPES[options.device]]
    options.head_dims = options.head_dims or {"cpu": [32, 64], "cuda": [128]}[options.device]
    return options


def rows_and_columns(text: str) -> tuple[int, int]:
    """A shape in tokens; an argparse type."""
    rows, found, columns = text.partition("x")
    if not found:
        raise argparse.ArgumentTypeError(f"must be rows and columns, for instance 8x64, got {text!r}")
    return whole_number(rows), whole_number(columns)


def timed(shape: tuple[int, int], radius: int, text: int, head_dim: int, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of each backend for one shape."""
    device = torch.device(options.device)
    dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
    tail = HEADS[options.device], head_dim
    query, key, value = (torch.randn(1, *shape, *tail, device=device, dtype=dtype) for _ in range(3))
    texts = [torch.randn(1, text, *tail, device=device, dtype=dtype) for _ in range(2)]
    rows, columns = shape
    request = CallShape(device.type, dtype, *tail[::-1], rows, rows, columns, text, radius)
    names = [
        name for name in options.backends or CANDIDATES[device.type] if BACKENDS[name].why_not_here(request) is None
    ]
    calls = [
        partial(window_attention, query, key, value, *texts, radius=radius, row_offset=0, backend=BACKENDS[name])
        for name in names
    ]
    seconds = dict(zip(names, interleaved(calls, options.repetitions), strict=True))
    return row_of(request, seconds)


def row_of(request: CallShape, seconds: dict[str, float]) -> dict[str, Any]:
    """The row of a shape in files of results; gpu/speed.py writes it too."""
    sizes = {name: getattr(request, name) for name in ("rows", "columns", "radius", "text", "head_dim")}
    return {"device_type": request.device_type, "dtype": str(request.dtype), **sizes, "seconds": seconds}


def fastest_first(row: dict[str, Any]) -> list[str]:
    return sorted(row["seconds"], key=row["seconds"].__getitem__)


def results() -> list[Path]:
    """Files that the table is made from."""
    return sorted(file for name in FILES for file in RESULTS.glob(f"*/{name}"))


def table_of(files: list[Path]) -> str:
    """The table as JSON: one line for each row, and the sources."""
    sources, lines = {}, []
    for file in files:
        results = json.loads(file.read_text())
        rows = [row for row in results["rows"] if isinstance(row.get("seconds"), dict)]
        source = f"{file.parent.name}/{file.name}"
        sources[source] = {name: results["machine"][name] for name in ("device", "date", "versions", "command")}
        for row in rows:
            seconds = {name: float(f"{row['seconds'][name]:.3g}") for name in fastest_first(row)}
            lines.append(json.dumps({**row, "seconds": seconds, "source": source}))
    listed = ",\n  ".join(f"{json.dumps(name)}: {json.dumps(about)}" for name, about in sources.items())
    rows_text = ",\n  ".join(lines)
    return f'{{"sources": {{\n  {listed}\n }},\n "rows": [\n  {rows_text}\n ]}}\n'


if __name__ == "__main__":
    main()
