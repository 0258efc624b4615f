"""The table of passes: each row is printed when it is known, so that a run cut short tells how far it came."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

from rich.console import Console
from rich.table import Table
from rich.text import Text

from clear_dist.verification.finding import Result

Show = Callable[[Result], None]
CAPTIONS = {True: "pass", False: "FAIL"}
WIDTHS = {"": 4, "check": 52, "error": 7, "at most": 7}
"""Of columns, equal in all rows; `figure` takes what is left, and from `check` what it lacks."""
NARROWEST_CHECK, FIGURE = 24, 56


@contextmanager
def shown(*, rank: int, to_stderr: bool) -> Iterator[Show]:
    """What to call with each result; silent on all ranks but the first.

    Args:
        to_stderr: the result proper is written to stdout.
    """
    stream = sys.stderr if to_stderr else sys.stdout
    if rank != 0:
        yield lambda result: None
    elif stream.isatty():
        yield coloured(stream)
    else:
        yield lambda result: print(plain(result), file=stream, flush=True)


def coloured(stream: TextIO) -> Show:
    """Rows of a table, for a terminal."""
    console = Console(file=stream)
    widths = WIDTHS | {"check": min(WIDTHS["check"], max(NARROWEST_CHECK, console.width - FIGURE))}

    def row(*cells: Text | str) -> None:
        table = Table(box=None, show_header=False, padding=(0, 1, 0, 0))
        for width in widths.values():
            table.add_column(width=width, overflow="fold")
        table.add_column(overflow="fold")
        table.add_row(*cells)
        console.print(table)

    row(*(Text(name, style="bold") for name in (*widths, "figure")))

    def show(result: Result) -> None:
        caption = Text(CAPTIONS[result.passed], style="green" if result.passed else "bold red")
        worst, figure = result.worst, result.findings[0].figure
        row(caption, result.name, f"{worst.error:.2g}", f"{worst.tolerance:g}", figure)
        for fault in result.faults:
            console.print(Text(f"      {fault}", style="red"))

    return show


def plain(result: Result) -> str:
    """The same as one line, and one for each rank that found something wrong."""
    worst = result.worst
    head = f"{CAPTIONS[result.passed]}  {result.name}: {result.findings[0].figure}; "
    return "\n      ".join([f"{head}error {worst.error:.2g}, at most {worst.tolerance:g}", *result.faults])
