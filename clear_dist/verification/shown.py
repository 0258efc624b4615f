"""The table of passes: drawn row by row on a terminal, else a line for each check, so that a run cut short tells."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from clear_dist.verification.finding import Result

Show = Callable[[Result], None]
CAPTIONS = {True: "pass", False: "FAIL"}


@contextmanager
def shown(*, rank: int, to_stderr: bool) -> Iterator[Show]:
    """What to call with each result; silent on all ranks but the first.

    Args:
        to_stderr: the result proper is written to stdout.
    """
    stream = sys.stderr if to_stderr else sys.stdout
    if rank != 0:
        yield lambda result: None
    elif not stream.isatty():
        yield lambda result: print(plain(result), file=stream, flush=True)
    else:
        table = Table("", "check", "error", "at most", "figure")
        with Live(table, console=Console(stderr=to_stderr), auto_refresh=False) as live:

            def add(result: Result) -> None:
                add_row(table, result)
                live.refresh()

            yield add


def add_row(table: Table, result: Result) -> None:
    """A row for the check, and one for each rank that found something wrong."""
    caption = Text(CAPTIONS[result.passed], style="green" if result.passed else "bold red")
    worst, figure = result.worst, result.findings[0].figure
    table.add_row(caption, result.name, f"{worst.error:.2g}", f"{worst.tolerance:g}", figure)
    for fault in result.faults:
        table.add_row("", Text(fault, style="red"))


def plain(result: Result) -> str:
    """The same on lines of their own."""
    worst = result.worst
    head = f"{CAPTIONS[result.passed]}  {result.name}: {result.findings[0].figure}; "
    return "\n      ".join([f"{head}error {worst.error:.2g}, at most {worst.tolerance:g}", *result.faults])
