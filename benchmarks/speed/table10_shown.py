"""The output of table10.py: a table for each size, the error of projections, columns of the files, and a plot."""

from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.lib.cells import DISTRIFUSION
from benchmarks.lib.counts import FLUX, TOKEN, gathering_over_halos
from benchmarks.lib.tables import FULL, GIGA, STALE, Cell, about_the_measurement, console_of
from clear_dist.options import WARMUP_STEPS

Places = dict[tuple[str, int, int], list[Cell]]
"""Cells by setting, size and number of ranks; measured ones before projected ones."""
ABREAST = 64 * TOKEN
"""Side in pixels of the image for which the speed-up of two ranks is printed."""
STEPS = 50
"""Steps of a generation, in the paper's Table 10."""
ABOUT_NA = "paper: NA: Table 10 leaves out r = 16 at 1024 px where stripes are thinner than the border"


def show_size(cells: list[Cell], header: dict[str, Any]) -> None:
    """Print the table of one size."""
    console_of(120).print(table_of(cells[0].side, arranged(cells), header))


def show_all(cells: list[Cell], header: dict[str, Any]) -> None:
    """Print what concerns all sizes: errors of projections, two ranks against one, notes."""
    by_place = arranged(cells)
    console = console_of(120)
    show_errors(by_place, console)
    lowest = ", ".join(f"{share:.0%}" for share in header["all_at_once"])
    console.print(f"a matrix product on all ranks at once reaches, after each size, {lowest} of its rate on one alone")
    show_two_ranks(by_place, console)
    ratio = gathering_over_halos(FLUX, 8192, 8, 16)
    console.print(
        f"FLUX.1-dev, 8192 px, r = 16, N = 8: a rank's halos, text and join are 1/{ratio:.1f} of the bytes "
        "of gathering all keys and values (counted)"
    )
    show_notes(cells, console)


def arranged(cells: list[Cell]) -> Places:
    by_place: Places = {}
    for cell in cells:
        by_place.setdefault((cell.setting, cell.side, cell.ranks), []).append(cell)
    return by_place


def table_of(side: int, by_place: Places, header: dict[str, Any]) -> Table:
    bandwidth = f"{header['gigabytes_per_second']:.3g} GB/s each way ({header['bandwidth']})"
    caption = (
        f"{about_the_measurement(header)}\nprojected: a share measured on one rank, and bytes over {bandwidth}\n"
        f"stale, DistriFusion: {WARMUP_STEPS} steps as in the row without, then {STEPS - WARMUP_STEPS} stale ones; "
        "s / step is of these\n"
        "x: times as fast as N = 1, where stale is sync; GB: highest of a rank; peak: of a large product of matrices"
    )
    table = Table(title=f"{side} px: s / {STEPS} steps | s / step", caption=caption, show_lines=True)
    table.add_column("setting", no_wrap=True)
    numbers = sorted({ranks for _, where, ranks in by_place if where == side})
    for ranks in numbers:
        table.add_column(f"N = {ranks}", justify="right", no_wrap=True)
    for setting in dict.fromkeys(setting for setting, where, _ in by_place if where == side):
        table.add_row(setting, *(text_of(setting, side, ranks, by_place, header) for ranks in numbers))
    return table


def text_of(setting: str, side: int, ranks: int, by_place: Places, header: dict[str, Any]) -> str:
    cells = by_place.get((setting, side, ranks), [])
    figures = [cell for cell in cells if cell.median is not None]
    lines = [] if figures else list(dict.fromkeys(cell.origin for cell in cells)) or ["-"]
    alone = generation_of(setting if (setting, side, 1) in by_place else FULL.name, side, 1, by_place)
    for cell in figures:
        seconds = generation_of(setting, side, ranks, by_place, cell.origin)
        lines.append(f"{'-' if seconds is None else f'{seconds:.2f}'} | {cell.median:.3f}")
        gain = f", [red]{alone / seconds:.2f} x[/]" if alone and seconds and ranks > 1 else ""
        lines.append(f"{cell.origin}{gain}")
        lines.append(f"{cell.peak_bytes / GIGA:.2f} GB, {(cell.rate or 0.0) / header['peak']:.0%} peak")
    return "\n".join([*lines, *(["paper: NA"] if any(map(is_na_in_paper, cells)) else [])])


def is_na_in_paper(cell: Cell) -> bool:
    """Whether the caption of Table 10 says that the paper has no such figure; others it may lack are not known."""
    return cell.window == 16 and cell.side == 1024 and cell.side // TOKEN // cell.ranks < cell.window


def generation_of(setting: str, side: int, ranks: int, by_place: Places, origin: str = "measured") -> float | None:
    """Seconds of `STEPS` steps; in a stale setting the first are as long as those of the same one in sync."""
    in_sync = FULL.name if setting == DISTRIFUSION.name else setting.removesuffix(STALE)
    first, later = (seconds_of(name, side, ranks, by_place, origin) for name in (in_sync, setting))
    return WARMUP_STEPS * first + (STEPS - WARMUP_STEPS) * later if first and later else None


def columns_of(cells: list[Cell]) -> Callable[[Cell], dict[str, Any]]:
    """The table's own columns of a cell in files."""
    by_place = arranged(cells)
    return lambda cell: {
        f"seconds_per_{STEPS}_steps": generation_of(cell.setting, cell.side, cell.ranks, by_place, cell.origin),
        "paper": "NA" if is_na_in_paper(cell) else "",
    }


def seconds_of(setting: str, side: int, ranks: int, by_place: Places, origin: str = "measured") -> float | None:
    found = by_place.get((setting, side, ranks), [])
    return next((cell.median for cell in found if cell.origin == origin), None)


def show_errors(by_place: Places, console: Console) -> None:
    """Print how far projections are off, where a cell was both measured and projected."""
    errors = []
    for place in by_place:
        measured, projected = (seconds_of(*place, by_place, origin) for origin in ("measured", "projected"))
        if measured and projected:
            errors.append((projected / measured - 1, place))
    if not errors:
        console.print("no cell was both measured and projected: how far projections are off is not known")
        return
    table = Table("setting", "size", "N", "projected against measured", title="Error of the projections")
    for error, (setting, side, ranks) in errors:
        table.add_row(setting, f"{side} px", str(ranks), f"{error:+.0%}")
    console.print(table)
    console.print(f"median of all projections' errors: {median(abs(error) for error, _ in errors):.0%}")


def show_two_ranks(by_place: Places, console: Console) -> None:
    """Print the speed-up of two ranks at 64 x 64 tokens; each rank has as many threads as the one."""
    for setting, side, ranks in by_place:
        alone, both = (generation_of(setting, side, number, by_place) for number in (1, 2))
        if side == ABREAST and ranks == 2 and alone and both:
            console.print(f"{setting}, 64 x 64 tokens: 2 ranks are {alone / both:.2f} times as fast as 1 (measured)")


def show_notes(cells: list[Cell], console: Console) -> None:
    """Print why cells are empty, here or in the paper."""
    sides: dict[str, dict[str, None]] = {}
    for cell in cells:
        if cell.note:
            why = f"{cell.setting}, N = {cell.ranks}: {cell.origin}: {cell.note}"
            sides.setdefault(why, {})[str(cell.side)] = None  # once, if both are empty
    for why, where in sides.items():
        console.print(f"{why} ({', '.join(where)} px)", style="dim")
    if any(map(is_na_in_paper, cells)):
        console.print(ABOUT_NA, style="dim")


def plot(cells: list[Cell], header: dict[str, Any], file: Path) -> None:
    """Seconds for 50 steps over the number of ranks, a panel for each size; projections are hollow and dotted."""
    from matplotlib import pyplot

    by_place = arranged(cells)
    sides, numbers = sorted({cell.side for cell in cells}), sorted({cell.ranks for cell in cells})
    figure, panels = pyplot.subplots(1, len(sides), figsize=(4.2 * len(sides), 4.5), squeeze=False)
    settings = list(dict.fromkeys(cell.setting for cell in cells if cell.median is not None))
    for side, axes in zip(sides, panels[0], strict=True):
        for number, setting in enumerate(settings):
            for origin, style, face in (("measured", "-", f"C{number}"), ("projected", ":", "none")):
                found = {ranks: generation_of(setting, side, ranks, by_place, origin) for ranks in numbers}
                mine = {ranks: seconds for ranks, seconds in found.items() if seconds is not None}
                label = setting if origin == "measured" else None
                axes.plot(
                    list(mine),
                    list(mine.values()),
                    style,
                    marker="o",
                    color=f"C{number}",
                    markerfacecolor=face,
                    label=label,
                )
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(numbers, [str(ranks) for ranks in numbers])
        axes.set(title=f"{side} px", xlabel="ranks")
    panels[0][0].set_ylabel(f"seconds for {STEPS} steps")
    figure.suptitle(f"{about_the_measurement(header)}\nfilled: measured; hollow, dotted: projected", size=9, y=1.02)
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="lower center", ncols=3, fontsize=7)
    figure.subplots_adjust(bottom=0.28, top=0.85, wspace=0.3)
    figure.savefig(file, dpi=120, bbox_inches="tight")
    pyplot.close(figure)
