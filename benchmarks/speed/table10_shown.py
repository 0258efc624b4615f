"""The output of table10.py: a table for each size, the error of projections, and a plot."""

from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.lib.counts import FLUX, TOKEN, gathering_over_halos
from benchmarks.lib.tables import GIGA, STEPS_IN_TABLE, Cell, about_the_measurement, console_of

Places = dict[tuple[str, int, int], list[Cell]]
"""Cells by setting, size and number of ranks; measured ones before projected ones."""
ABREAST = 64 * TOKEN
"""Side in pixels of the image for which the speed-up of two ranks is printed."""
BASE = "full attention"
"""Name of the setting that Ulysses and ring attention are on one rank."""


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
        "x: times as fast as N = 1, where stale is sync; GB: highest of a rank; peak: of a large product of matrices"
    )
    table = Table(title=f"{side} px: s / step | s / {STEPS_IN_TABLE} steps", caption=caption, show_lines=True)
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
    if not figures:
        return "\n".join(dict.fromkeys(cell.origin for cell in cells)) or "-"
    alone = seconds_of(setting if (setting, side, 1) in by_place else BASE, side, 1, by_place)
    lines = []
    for cell in figures:
        seconds = cell.median or 0.0
        lines.append(f"{seconds:.3f} | {STEPS_IN_TABLE * seconds:.2f}")
        gain = f", {alone / seconds:.2f} x" if alone and ranks > 1 else ""
        lines.append(f"{cell.origin}{gain}")
        lines.append(f"{cell.peak_bytes / GIGA:.2f} GB, {(cell.rate or 0.0) / header['peak']:.0%} peak")
    return "\n".join(lines)


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
        alone, both = (seconds_of(setting, side, number, by_place) for number in (1, 2))
        if side == ABREAST and ranks == 2 and alone and both:
            console.print(f"{setting}, 64 x 64 tokens: 2 ranks are {alone / both:.2f} times as fast as 1 (measured)")


def show_notes(cells: list[Cell], console: Console) -> None:
    """Print why cells are empty."""
    sides: dict[str, dict[str, None]] = {}
    for cell in cells:
        if cell.note:
            why = f"{cell.setting}, N = {cell.ranks}: {cell.origin}: {cell.note}"
            sides.setdefault(why, {})[str(cell.side)] = None  # once, if both are empty
    for why, where in sides.items():
        console.print(f"{why} ({', '.join(where)} px)", style="dim")


def plot(cells: list[Cell], header: dict[str, Any], file: Path) -> None:
    """Seconds per step over the number of ranks, a panel for each size; projections are hollow and dotted."""
    from matplotlib import pyplot

    sides = sorted({cell.side for cell in cells})
    figure, panels = pyplot.subplots(1, len(sides), figsize=(4.2 * len(sides), 4.5), squeeze=False)
    settings = list(dict.fromkeys(cell.setting for cell in cells if cell.median is not None))
    for side, axes in zip(sides, panels[0], strict=True):
        for number, setting in enumerate(settings):
            for origin, style, face in (("measured", "-", f"C{number}"), ("projected", ":", "none")):
                mine = [cell for cell in cells if (cell.setting, cell.side, cell.origin) == (setting, side, origin)]
                mine.sort(key=lambda cell: cell.ranks)
                seconds = [cell.median or 0.0 for cell in mine]
                label = setting if origin == "measured" else None
                axes.plot(
                    [cell.ranks for cell in mine],
                    seconds,
                    style,
                    marker="o",
                    color=f"C{number}",
                    markerfacecolor=face,
                    label=label,
                )
        numbers = sorted({cell.ranks for cell in cells})
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(numbers, [str(ranks) for ranks in numbers])
        axes.set(title=f"{side} px", xlabel="ranks")
    panels[0][0].set_ylabel("seconds per step")
    figure.suptitle(f"{about_the_measurement(header)}\nfilled: measured; hollow, dotted: projected", size=9)
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="lower center", ncols=3, fontsize=7)
    figure.subplots_adjust(bottom=0.28, top=0.85, wspace=0.3)
    figure.savefig(file, dpi=120, bbox_inches="tight")
    pyplot.close(figure)
