"""What a check tells: each rank's finding, and all ranks' together."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from clear_dist.attention import BACKENDS, Backend
from clear_dist.comm.group import Group
from clear_dist.comm.halo_exchange import HaloExchange
from clear_dist.comm.messages import post
from clear_dist.comm.text_reduce import TextReduce
from clear_dist.parallelize import parallelize


@dataclass(frozen=True, kw_only=True)
class Subjects:
    """What is verified. Tests put something faulty in its place, to see that it is found."""

    exchange: Callable[..., HaloExchange] = HaloExchange
    reduction: Callable[..., TextReduce] = TextReduce
    backends: Mapping[str, Backend] = field(default_factory=lambda: BACKENDS)
    parallelize: Callable[..., Any] = parallelize
    post: Callable[..., Any] = post


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What one rank found; all ranks yield findings of the same names in the same order."""

    name: str
    error: float
    """0 where all is right; NaN and infinity are never within a tolerance."""
    tolerance: float = 0.0
    figure: str
    """What was looked at, or measured, in a few words; rank 0's is shown."""
    fault: str = ""
    """What is wrong, where `error` exceeds the tolerance."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """This rank's figures for the JSON report, plain values."""

    @property
    def passed(self) -> bool:
        return self.error <= self.tolerance


Check = Callable[[Group, Subjects], Iterator[Finding]]
"""All ranks run it together. What it raises ends the run; what it yields is gathered before it goes on."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """One finding of all ranks."""

    findings: Sequence[Finding]
    """By rank."""
    seconds: float

    @property
    def name(self) -> str:
        return self.findings[0].name

    @property
    def passed(self) -> bool:
        return all(finding.passed for finding in self.findings)

    @property
    def worst(self) -> Finding:
        """The first that failed, else the one with the largest error."""
        failed = [finding for finding in self.findings if not finding.passed]
        return failed[0] if failed else max(self.findings, key=lambda finding: finding.error)

    @property
    def faults(self) -> list[str]:
        """A line for each rank that found something wrong."""
        return [
            f"rank {rank}: {finding.fault or f'error {finding.error:.3g}'}"
            for rank, finding in enumerate(self.findings)
            if not finding.passed
        ]

    def as_dict(self) -> dict[str, Any]:
        """For the JSON report; an error that is no number is a word there."""
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
    """All ranks' findings on all ranks; all call this."""
    findings = group.gather_objects(finding)
    names = {theirs.name for theirs in findings}
    assert names == {finding.name}, f"ranks are at different checks: {names}"
    return Result(findings=findings, seconds=seconds)


def _plain(error: float) -> float | str:
    """JSON has no NaN and no infinity."""
    return error if abs(error) < float("inf") else str(error)
