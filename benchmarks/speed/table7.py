"""The paper's Table 7 on one device: how long does a step take, and how much of the device's peak is that?

    python -m benchmarks.speed.table7 --folder benchmarks/results/2026-11-21-cpu

Full attention is diffusers' own pipeline, untouched; CLEAR is the same pipeline after `parallelize`, on one rank. On
CUDA the model is FLUX.1-dev's architecture in bfloat16, on a CPU a small one in float32, both with random weights. For
each size all settings take turns; figures are medians. With --compile everyone's blocks are compiled, else nothing but
kernels of attention. Work is counted without waste (lib/counts.py); peak is the rate of a large product of matrices in
the same dtype and run. Cells that would take too long or do not fit say so. Results are saved after each size.

The paper's column is Table 7 as printed: FLUX.1-dev on an H100. Its times are for 20 steps (Fig. 2), whatever its head.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from benchmarks.lib.cells import Bench, measure
from benchmarks.lib.counts import FLUX, attention_work, middle_part
from benchmarks.lib.flags import whole_number
from benchmarks.lib.steps import make_pipeline, peak_rate
from benchmarks.lib.tables import (
    FULL,
    GIGA,
    STEPS_IN_TABLE,
    TERA,
    Cell,
    Limits,
    about_the_measurement,
    console_of,
    free_bytes,
    header_of,
    model_and_dtype,
    parse,
    parser_of,
    save,
    windows,
)
from clear_dist.comm.group import Group

SIDES_OF_PAPER = (1024, 2048, 4096, 8192)
PAPER_SECONDS = {
    "full attention": (4.45, 20.90, 148.97, 1842.48),
    "CLEAR r = 8": (4.40, 15.67, 69.41, 293.50),
    "CLEAR r = 16": (4.56, 17.19, 83.13, 360.83),
    "CLEAR r = 32": (5.45, 19.95, 109.57, 496.22),
}
"""Seconds for 20 steps."""
PAPER_TERAFLOPS_PER_LAYER = {
    "full attention": (0.26, 3.51, 53.60, 847.73),
    "CLEAR r = 8": (0.06, 0.25, 0.98, 3.92),
    "CLEAR r = 16": (0.09, 0.35, 1.43, 5.79),
    "CLEAR r = 32": (0.15, 0.72, 3.14, 13.09),
}
"""TFLOP of one layer's attention."""
ABOUT_THE_PAPER = "paper: Table 7, FLUX.1-dev on one H100, 20 steps"


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--threads", type=whole_number, default=torch.get_num_threads(), help="on a CPU")
    options = parse(parser)
    torch.set_num_threads(options.threads)
    world = Group.create(options.device)
    (model, dtype), device = model_and_dtype(options), world.device
    pipe = make_pipeline(model, device, dtype)
    limits = Limits(model, options.cell_seconds, options.repetitions, peak_rate(device, dtype), free_bytes(device))
    settings = FULL, *windows(options.radii)
    bench = Bench(pipe=pipe, world=world, groups={1: world}, limits=limits, settings=settings, compile=options.compile)
    header = header_of(options, limits, device)
    cells: list[Cell] = []
    for side in options.sides:
        cells += measure(side, bench)
        header["peak"] = max(header["peak"], peak_rate(device, dtype))
        if options.folder is not None:  # after each size: the next may take hours
            save(options.folder, "table7", header, cells)
            plot(cells, header, options.folder / "table7.png")
    show(cells, header)
    world.close()


def show(cells: list[Cell], header: dict[str, Any]) -> None:
    sides = sorted({cell.side for cell in cells})
    settings = list(dict.fromkeys(cell.setting for cell in sorted(cells, key=lambda cell: order(cell.setting))))
    by_place = {(cell.setting, cell.side): cell for cell in cells}
    console = console_of(120)
    measured = about_the_measurement(header)
    times = Table(title=f"Seconds for {STEPS_IN_TABLE} steps", caption=f"measured: {measured}\n{ABOUT_THE_PAPER}")
    work = Table(title="TFLOP of attention per layer", caption=f"counted: FLUX.1-dev\n{ABOUT_THE_PAPER}")
    for table, ours in ((times, "measured"), (work, "counted")):
        table.add_column("setting", no_wrap=True)
        for side in sides:
            table.add_column(f"{side} px\n{ours}", justify="right")
            if side in SIDES_OF_PAPER:
                table.add_column(f"{side} px\npaper", justify="right", style="dim")
    for name in settings:
        listed = [by_place[name, side] for side in sides]
        times.add_row(name, *beside_paper(listed, [text_of(cell) for cell in listed], PAPER_SECONDS))
        counted = [f"{attention_per_layer(cell):.2f}" for cell in listed]
        work.add_row(name, *beside_paper(listed, counted, PAPER_TERAFLOPS_PER_LAYER))
    console.print(times, work, details(cells, header))


def order(setting: str) -> int:
    names = list(PAPER_SECONDS)
    return names.index(setting) if setting in names else len(names)


def text_of(cell: Cell) -> str:
    return cell.origin if cell.median is None else f"{STEPS_IN_TABLE * cell.median:.2f}"


def attention_per_layer(cell: Cell) -> float:
    """TFLOP of FLUX.1-dev, whatever model was timed."""
    return attention_work(FLUX, middle_part(cell.side, 1, cell.window)) / FLUX.layers / TERA


def beside_paper(cells: list[Cell], texts: list[str], paper: dict[str, tuple[float, ...]]) -> Iterator[str]:
    """Each text, followed by the paper's figure where it has that size."""
    for cell, text in zip(cells, texts, strict=True):
        yield text
        if cell.side in SIDES_OF_PAPER:
            figures = paper.get(cell.setting)
            yield "-" if figures is None else f"{figures[SIDES_OF_PAPER.index(cell.side)]:.2f}"


def details(cells: list[Cell], header: dict[str, Any]) -> Table:
    peak = header["peak"]
    caption = f"work of linear layers and attention, as far as it is wanted; peak: {peak / TERA:.3g} TFLOP/s, measured"
    table = Table(title="In detail", caption=caption)
    for name in ("size", "setting"):
        table.add_column(name, no_wrap=True)
    for name in ("s / step", "TFLOP", "TFLOP/s", "of peak", "peak GB"):
        table.add_column(name, justify="right")
    table.add_column("origin")
    for cell in cells:
        figures = ["-"] * 5
        if cell.median is not None and cell.rate is not None:
            figures = [
                f"{cell.median:.3f}",
                f"{cell.work / TERA:.3g}",
                f"{cell.rate / TERA:.3g}",
                f"{cell.rate / peak:.0%}",
                f"{cell.peak_bytes / GIGA:.2f}",
            ]
        table.add_row(
            f"{cell.side} px", cell.setting, *figures, f"{cell.origin}: {cell.note}" if cell.note else cell.origin
        )
    return table


def plot(cells: list[Cell], header: dict[str, Any], file: Path) -> None:
    """Seconds for 20 steps over the size: measured, and in the paper."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    for number, name in enumerate(PAPER_SECONDS):
        mine = [cell for cell in cells if cell.setting == name and cell.median is not None]
        seconds = [STEPS_IN_TABLE * (cell.median or 0) for cell in mine]
        axes.plot([cell.side for cell in mine], seconds, marker="o", color=f"C{number}", label=f"{name}, measured")
        paper = dict(zip(SIDES_OF_PAPER, PAPER_SECONDS[name], strict=True))
        axes.plot(list(paper), list(paper.values()), "--", color=f"C{number}", alpha=0.5, label=f"{name}, paper")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    sides = sorted({cell.side for cell in cells} | set(SIDES_OF_PAPER))
    axes.set_xticks(sides, [str(side) for side in sides])
    axes.set(xlabel="side of the image in pixels", ylabel=f"seconds for {STEPS_IN_TABLE} steps")
    axes.set_title(f"measured: {about_the_measurement(header)}\n{ABOUT_THE_PAPER}", size=8)
    axes.legend(fontsize=7, ncols=2)
    figure.savefig(file, dpi=120, bbox_inches="tight")
    pyplot.close(figure)


if __name__ == "__main__":
    main()
