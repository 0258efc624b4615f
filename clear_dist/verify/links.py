"""Speed of tensors between neighbours, as halos travel, and in the all-reduce of the text's attention."""

import time
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from statistics import median
from typing import Any

import torch
from torch import Tensor

from clear_dist.comm.counters import Counters
from clear_dist.comm.group import Group, telling_lost_peers
from clear_dist.comm.text_reduce import REDUCTIONS, Reduction
from clear_dist.engine.family import Sample
from clear_dist.families.transformers import SAMPLES
from clear_dist.verify.dense import largest_error
from clear_dist.verify.finding import Finding, Subjects

HALO_BYTES = (1_000, 64_000, 1_000_000, 11_800_000, 47_200_000, 94_400_000)
"""The last three: keys and values of 3072 channels in bfloat16 for radius 16 at 1024, 4096 and 8192 px, per side."""
REPETITIONS, MORE_REPETITIONS, WARM_UP_RUNS = 5, 20, 1
SMALL = 1_000_000
"""Bytes; up to here there are more repetitions, below no bandwidth is told."""
MOST_SECONDS = 10.0
"""Limit for all pairs and repetitions of one size; larger sizes are left out."""
BYTES_PER_NUMBER = 4


def measure_links(group: Group, subjects: Subjects) -> Iterator[Finding]:
    """Each pair of neighbours alone, both ways at once; passes if data arrive as sent."""
    for size, following in pairwise((*HALO_BYTES, HALO_BYTES[-1])) if group.size > 1 else ():
        timed, wrong = _between_neighbours(group, size, subjects.post)
        pairs = group.gather_objects(timed)[:-1]  # by the lower rank of each
        expected = (WARM_UP_RUNS + REPETITIONS) * sum(map(median, pairs)) * following / size
        too_slow = SMALL <= size < following and expected > MOST_SECONDS
        yield Finding(
            name=f"neighbours, {_megabytes(size)}",
            error=sum(wrong.values()),
            figure=_speeds(pairs, size) + (f"; {_megabytes(following)} would take too long" if too_slow else ""),
            fault="; ".join(f"{count} numbers from rank {peer} are wrong" for peer, count in wrong.items() if count),
            details=_details(group, timed, size),
        )
        if too_slow:  # on all ranks alike: they have the same figures
            break
    for sample in SAMPLES:
        for reduction in REDUCTIONS:
            yield _text(group, subjects, sample, reduction)


def _between_neighbours(group: Group, size: int, post: Callable[..., Any]) -> tuple[list[float], dict[int, int]]:
    """Seconds of each exchange with the next rank, and counts of wrong numbers by peer."""
    numbers = size // BYTES_PER_NUMBER
    mine = torch.full((numbers,), float(group.rank + 1), device=group.device)
    sending = group.wire_buffer(mine.shape, mine.dtype) if group.copies_to_wire else mine
    receiving = group.wire_buffer(mine.shape, mine.dtype)
    seconds: list[float] = []
    wrong: dict[int, int] = {}
    for lower in range(group.size - 1):
        if group.rank in (lower, lower + 1):
            peer = 2 * lower + 1 - group.rank
            receiving.fill_(torch.nan)
            exchange = _Exchange(group, peer, mine, sending, receiving, post)
            times = _timed(exchange, group, MORE_REPETITIONS if size <= SMALL else REPETITIONS)
            wrong[peer] = int((receiving != peer + 1).sum())
            if group.rank == lower:
                seconds = times
        group.barrier()
    return seconds, wrong


class _Exchange:
    def __init__(
        self, group: Group, peer: int, mine: Tensor, sending: Tensor, receiving: Tensor, post: Callable[..., Any]
    ) -> None:
        self._group = group
        self._peer = peer
        self._mine = mine
        self._sending = sending
        self._receiving = receiving
        self._post = post

    def __call__(self) -> None:
        if self._sending is not self._mine:
            self._sending.copy_(self._mine, non_blocking=True)
            self._group.settle()
        with telling_lost_peers(f"rank {self._group.ranks[self._peer]}"):
            for work in self._post(self._group, [(self._peer, self._receiving)], [(self._peer, self._sending)]):
                work.wait()
        self._receiving.to(self._group.device, non_blocking=True)


def _text(group: Group, subjects: Subjects, sample: Sample, reduction: Reduction) -> Finding:
    """The mean of the ranks' numbers, which is what both reductions give where all log-sum-exps are equal."""
    dtype = torch.bfloat16 if group.device.type == "cuda" else torch.float32
    counters = Counters()
    reduce = subjects.reduction(group, reduction, counters)
    out = torch.full(sample.text_shape, group.rank + 1.0, device=group.device, dtype=dtype)
    lse = torch.zeros(sample.text_shape[:-1], device=group.device)
    results: list[Tensor] = []
    counters.begin_step()
    seconds = _timed(lambda: results.append(reduce.start(out, lse).wait(torch.empty_like(out))), group, REPETITIONS)
    taken = max(median(theirs) for theirs in group.gather_objects(seconds))
    size = int(counters.as_dict()["text_bytes_reduced"][0]) // (REPETITIONS + WARM_UP_RUNS)
    error = largest_error(results[-1], torch.full(sample.text_shape, (group.size + 1) / 2))
    return Finding(
        name=f"all-reduce of {sample.name}'s text, {reduction.word}",
        error=error,
        tolerance=1e-2 if dtype == torch.bfloat16 else 1e-5,
        figure=f"{_megabytes(size)} in {1e3 * taken:.3g} ms",
        fault=f"off by {error:.2g} of the mean",
        details={"bytes": size, "seconds": seconds, "median_seconds": median(seconds)},
    )


def _timed(work: Callable[[], object], group: Group, repetitions: int) -> list[float]:
    seconds = []
    for _ in range(WARM_UP_RUNS + repetitions):
        began = time.perf_counter()
        work()
        if group.device.type == "cuda":
            torch.cuda.synchronize(group.device)
        seconds.append(time.perf_counter() - began)
    return seconds[WARM_UP_RUNS:]


def _speeds(pairs: Sequence[Sequence[float]], size: int) -> str:
    """Speed of the slowest pair, for which a step waits, and of the fastest."""
    medians = [median(seconds) for seconds in pairs]
    slowest, fastest = max(medians), min(medians)
    lower = medians.index(slowest)
    among = f"; fastest pair {_speed(fastest, size)}" if len(pairs) > 1 else ""
    return f"{_speed(slowest, size)} between ranks {lower} and {lower + 1}{among}"


def _speed(seconds: float, size: int) -> str:
    late = f"{1e6 * seconds:.0f} us" if seconds < 1e-3 else f"{1e3 * seconds:.3g} ms"
    return f"{late}, {size / seconds / 1e9:.3g} GB/s each way" if size >= SMALL else late


def _details(group: Group, seconds: Sequence[float], size: int) -> dict[str, Any]:
    if not seconds:
        return {}
    taken = median(seconds)
    speed = size / taken / 1e9
    return {
        "with": group.rank + 1,
        "bytes": size,
        "seconds": list(seconds),
        "median_seconds": taken,
        "gigabytes_per_second": speed,
    }


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.3g} MB" if size >= 1e6 else f"{size / 1e3:.3g} kB"
