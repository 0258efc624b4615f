"""The paper's Table 7 and Fig. 2 on one device: how long do 20 steps take, and what does CLEAR save?

    python -m benchmarks.speed.table7 --folder benchmarks/results/2026-11-21-cpu

Full attention is diffusers' own pipeline, untouched; CLEAR is the same pipeline after `parallelize`, on one rank. On
CUDA the model is FLUX.1-dev's architecture in bfloat16, on a CPU a small one in float32, both with random weights. For
each size all settings take turns; figures are medians. With --compile everyone's blocks are compiled, else nothing but
kernels of attention. Work is counted without waste (lib/counts.py); peak is the rate of a large product of matrices in
the same dtype and run. Cells that would take too long or do not fit say so. Results are saved after each size.

The paper's column is Table 7 as printed: FLUX.1-dev on an H100. Its times are for 20 steps (Fig. 2), whatever its head.
What CLEAR saves at 8192 px stands beside it: operations of a layer's attention, counted for FLUX.1-dev whatever was
timed, and time, where both were measured. The plot is Fig. 2.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from benchmarks.lib.cells import Bench, measure
from benchmarks.lib.counts import FLUX, Window, attention_work, middle_part
from benchmarks.lib.flags import whole_number
from benchmarks.lib.steps import make_pipeline, peak_rate
from benchmarks.lib.tables import (
    FULL,
    GIGA,
    TERA,
    Cell,
    Limits,
    about_the_measurement,
    console_of,
    free_bytes,
    header_of,
    load,
    model_and_dtype,
    parse,
    parser_of,
    save,
    windows,
)
from clear_dist.comm.group import Group

STEPS = 20
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
LARGEST = SIDES_OF_PAPER[-1]
"""Side in pixels for which the paper's abstract says what CLEAR saves."""


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--threads", type=whole_number, default=torch.get_num_threads(), help="on a CPU")
    options = parse(parser, "table7")
    header, cells = load(options.folder, "table7") if options.again else measured(options)
    show(cells, header)
    if options.folder is not None:
        plot(cells, header, options.folder / "table7.png")


def measured(options: argparse.Namespace) -> tuple[dict[str, Any], list[Cell]]:
    """Header and cells; they are saved, too."""
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
            save(options.folder, "table7", header, cells, columns_of)
    world.close()
    return header, cells


def columns_of(cell: Cell) -> dict[str, Any]:
    """The table's own columns of a cell in files."""
    return {
        f"seconds_per_{STEPS}_steps": cell.median and STEPS * cell.median,
        "attention_teraflop_per_layer": teraflop_per_layer(cell.side, cell.window),
    }


def show(cells: list[Cell], header: dict[str, Any]) -> None:
    sides = sorted({cell.side for cell in cells})
    by_place = {(cell.setting, cell.side): cell for cell in cells}
    console = console_of(120)
    about = about_the_measurement(header)
    times = Table(title=f"Seconds for {STEPS} steps", caption=f"measured: {about}\n{ABOUT_THE_PAPER}")
    work = Table(title="TFLOP of attention per layer", caption=f"counted: FLUX.1-dev\n{ABOUT_THE_PAPER}")
    for table, ours in ((times, "measured"), (work, "counted")):
        table.add_column("setting", no_wrap=True)
        for side in sides:
            table.add_column(f"{side} px\n{ours}", justify="right")
            if side in SIDES_OF_PAPER:
                table.add_column(f"{side} px\npaper", justify="right", style="dim")
    for name in windows_of(cells):
        listed = [by_place[name, side] for side in sides]
        times.add_row(name, *beside_paper(listed, [text_of(cell) for cell in listed], PAPER_SECONDS))
        counted = [f"{teraflop_per_layer(cell.side, cell.window):.2f}" for cell in listed]
        work.add_row(name, *beside_paper(listed, counted, PAPER_TERAFLOPS_PER_LAYER))
    console.print(times, work, savings(cells), details(cells, header))


def savings(cells: list[Cell]) -> Table:
    """What CLEAR saves of full attention at `LARGEST` px: operations of a layer's attention, and time."""
    caption = (
        "operations: counted, FLUX.1-dev; times as fast: a step, measured\n"
        "paper: by its Table 7; 99.5 % and 6.3 are what its abstract says"
    )
    table = Table(title=f"CLEAR against full attention at {LARGEST} px", caption=caption)
    table.add_column("setting", no_wrap=True)
    for name in ("operations saved\ncounted", "\npaper", "times as fast\nmeasured", "\npaper"):
        table.add_column(name, justify="right", style="dim" if "paper" in name else None)
    timed = {cell.setting: cell.median for cell in cells if cell.side == LARGEST}
    full_work, full_seconds = teraflop_per_layer(LARGEST, "full"), timed.get(FULL.name)
    for name, window in windows_of(cells).items():
        if window == "full":
            continue
        saved = f"{1 - teraflop_per_layer(LARGEST, window) / full_work:.2%}"
        seconds, in_paper = timed.get(name), name in PAPER_SECONDS
        faster = f"{full_seconds / seconds:.1f}" if full_seconds and seconds else "not measured"
        saved_there = f"{1 - 1 / paper_ratio(PAPER_TERAFLOPS_PER_LAYER, name):.1%}" if in_paper else "-"
        faster_there = f"{paper_ratio(PAPER_SECONDS, name):.1f}" if in_paper else "-"
        table.add_row(name, saved, saved_there, faster, faster_there)
    return table


def paper_ratio(paper: dict[str, tuple[float, ...]], name: str) -> float:
    """Full attention over CLEAR, at `LARGEST` px."""
    return paper[FULL.name][-1] / paper[name][-1]


def windows_of(cells: list[Cell]) -> dict[str, Window]:
    """Window by setting, in the paper's order."""
    return {cell.setting: cell.window for cell in sorted(cells, key=lambda cell: order(cell.setting))}


def order(setting: str) -> int:
    names = list(PAPER_SECONDS)
    return names.index(setting) if setting in names else len(names)


def text_of(cell: Cell) -> str:
    return cell.origin if cell.median is None else f"{STEPS * cell.median:.2f}"


def teraflop_per_layer(side: int, window: Window) -> float:
    """Operations of one layer's attention in FLUX.1-dev, whatever model was timed."""
    return attention_work(FLUX, middle_part(side, 1, window)) / FLUX.layers / TERA


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
    """The paper's Fig. 2: seconds for 20 steps, and operations of attention per layer, over the size."""
    from matplotlib import pyplot

    figure, (times, work) = pyplot.subplots(1, 2, figsize=(11, 4.5))
    sides = sorted({cell.side for cell in cells} | set(SIDES_OF_PAPER))
    for number, (name, window) in enumerate(windows_of(cells).items()):
        colour = f"C{number}"
        mine = {cell.side: STEPS * cell.median for cell in cells if cell.setting == name and cell.median is not None}
        times.plot(list(mine), list(mine.values()), "o-", color=colour)
        work.plot(sides, [teraflop_per_layer(side, window) for side in sides], "o-", color=colour, label=name)
        for axes, paper in ((times, PAPER_SECONDS), (work, PAPER_TERAFLOPS_PER_LAYER)):
            if name in paper:
                axes.plot(SIDES_OF_PAPER, paper[name], "x--", color=colour, markeredgecolor="black")
    times.set(title="measured", ylabel=f"seconds for {STEPS} steps")
    work.set(title="counted, FLUX.1-dev", ylabel="TFLOP of attention per layer")
    for axes in (times, work):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.set_xticks(sides, [str(side) for side in sides])
        axes.set_xlabel("side of the image in pixels")
    work.legend(title="dots: ours; crosses, dashed: paper", title_fontsize=7, fontsize=7)
    figure.suptitle(f"measured: {about_the_measurement(header)}\n{ABOUT_THE_PAPER}", size=8, y=1.02)
    figure.savefig(file, dpi=120, bbox_inches="tight")
    pyplot.close(figure)


if __name__ == "__main__":
    main()
