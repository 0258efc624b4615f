"""Findings of a check, each rank's and all ranks' together, and how they are shown."""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TextIO

from rich.console import Console
from rich.table import Table
from rich.text import Text

from clear_dist.attention import BACKENDS, Backend
from clear_dist.comm.group import Group
from clear_dist.comm.halo_exchange import HaloExchange
from clear_dist.comm.messages import post
from clear_dist.comm.text_reduce import TextReduce
from clear_dist.parallelize import parallelize


@dataclass(frozen=True, kw_only=True)
class Subjects:
    """Code under verification; tests put something faulty in its place."""

    exchange: Callable[..., HaloExchange] = HaloExchange
    reduction: Callable[..., TextReduce] = TextReduce
    backends: Mapping[str, Backend] = field(default_factory=lambda: BACKENDS)
    parallelize: Callable[..., Any] = parallelize
    post: Callable[..., Any] = post


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One rank's finding; all ranks yield findings of the same names in the same order."""

    name: str
    error: float
    """0 where all is right; NaN and infinity are never within a tolerance."""
    tolerance: float = 0.0
    figure: str
    """Extent of the check, or its measurement; rank 0's is shown."""
    fault: str = ""
    details: Mapping[str, Any] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        return self.error <= self.tolerance


Check = Callable[[Group, Subjects], Iterator[Finding]]
"""Run by all ranks together; an exception ends the run, a finding is gathered before the check goes on."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """All ranks' findings of one name, by rank."""

    findings: Sequence[Finding]
    seconds: float

    @property
    def name(self) -> str:
        return self.findings[0].name

    @property
    def passed(self) -> bool:
        return all(finding.passed for finding in self.findings)

    @property
    def worst(self) -> Finding:
        """The first failed one, else the one with the largest error."""
        failed = [finding for finding in self.findings if not finding.passed]
        return failed[0] if failed else max(self.findings, key=lambda finding: finding.error)

    @property
    def faults(self) -> list[str]:
        return [
            f"rank {rank}: {finding.fault or f'error {finding.error:.3g}'}"
            for rank, finding in enumerate(self.findings)
            if not finding.passed
        ]

    def as_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "passed": self.passed,
            "error": _plain(self.worst.error),
            "tolerance": self.worst.tolerance,
            "figure": self.findings[0].figure,
            "faults": self.faults,
            "seconds": self.seconds,
            "ranks": [{"error": _plain(finding.error), **finding.details} for finding in self.findings],
        }


def gather(group: Group, finding: Finding, seconds: float) -> Result:
    findings = group.gather_objects(finding)
    names = {theirs.name for theirs in findings}
    assert names == {finding.name}, f"ranks are at different checks: {names}"
    return Result(findings=findings, seconds=seconds)


def _plain(error: float) -> float | str:
    """JSON has no NaN and no infinity."""
    return error if abs(error) < float("inf") else str(error)


Show = Callable[[Result], None]
CAPTIONS = {True: "pass", False: "FAIL"}
WIDTHS = {"": 4, "check": 52, "error": 7, "at most": 7}
"""Widths of columns, equal in all rows; `figure` takes the rest, and from `check` what it lacks."""
NARROWEST_CHECK, FIGURE = 24, 56


@contextmanager
def shown(*, rank: int, to_stderr: bool) -> Iterator[Show]:
    """Function that shows a result, on rank 0 only; `to_stderr` where the report goes to stdout."""
    stream = sys.stderr if to_stderr else sys.stdout
    if rank != 0:
        yield lambda result: None
    elif stream.isatty():
        yield coloured(stream)
    else:
        yield lambda result: print(plain(result), file=stream, flush=True)


def coloured(stream: TextIO) -> Show:
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
    worst = result.worst
    head = f"{CAPTIONS[result.passed]}  {result.name}: {result.findings[0].figure}; "
    return "\n      ".join([f"{head}error {worst.error:.2g}, at most {worst.tolerance:g}", *result.faults])
