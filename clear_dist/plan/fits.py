"""A plan: whether a request fits, and if not, the nearest settings that do."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from operator import add
from typing import Any

from clear_dist.plan.counts import Traffic
from clear_dist.plan.memory import SHARED, Phase, RankMemory, rank_memory
from clear_dist.plan.request import PlanRequest
from clear_dist.plan.timing import StageTime, stage_time
from clear_dist.plan.traffic import step_traffic

ERROR = 0.1
"""Share of the peak by which an estimate may be wrong."""
MOST_RANKS = 64
SIZES_TRIED = 16
"""Sixteenths of the sides that were asked for."""


@dataclass(frozen=True, kw_only=True)
class Room:
    """The memory that ranks find."""

    bytes: int
    where: str
    """For people: a kind of GPU, or this machine."""
    sharing: int = 1
    """Ranks that share it."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What comes of a request."""

    request: PlanRequest
    room: Room

    @cached_property
    def ranks(self) -> tuple[RankMemory, ...]:
        """One for each rank; those that hold the same are computed once."""
        known: dict[object, RankMemory] = {}
        memories = []
        for rank in range(self.request.ranks):
            key = (rank == 0, self.request.parts_of_rank(rank))
            if key not in known:
                known[key] = rank_memory(self.request, rank)
            memories.append(replace(known[key], rank=rank))
        return tuple(memories)

    @property
    def largest(self) -> RankMemory:
        """The rank with the highest peak."""
        return max(self.ranks, key=lambda memory: memory.peak)

    @property
    def needed(self) -> int:
        """Bytes where ranks share their room: the largest ones together, what they have in common once."""
        shared = SHARED if self.request.forked and not self.request.on_cuda else 0
        return max(sum(phase.total for phase in phases) for phases in self._at_once) - (self._together - 1) * shared

    @property
    def fits(self) -> bool:
        return self.request.is_possible and self.needed <= self.room.bytes

    @property
    def is_refused(self) -> bool:
        """Whether it does not fit even if ranks share what they can and the estimate is as high above as it may be."""
        return (self.needed - self._shareable) * (1 - ERROR) > self.room.bytes

    @property
    def _together(self) -> int:
        """Ranks in the same room."""
        return min(self.room.sharing, self.request.ranks)

    @property
    def _at_once(self) -> tuple[list[Phase], list[Phase]]:
        """The phases that ranks in one room may be in together, before anything is drawn and then."""
        return (
            self._largest(memory.before for memory in self.ranks),
            self._largest(memory.drawing for memory in self.ranks),
        )

    def _largest(self, phases: Iterable[Phase]) -> list[Phase]:
        return sorted(phases, key=lambda phase: phase.total, reverse=True)[: self._together]

    @property
    def _shareable(self) -> int:
        """Bytes of weights on a CPU that all ranks but one may have in common with it."""
        most = max(self._at_once, key=lambda phases: sum(phase.total for phase in phases))
        return sum(phase.as_stored for phase in most) - max(phase.as_stored for phase in most)

    @cached_property
    def times(self) -> tuple[StageTime, ...]:
        """Of each stage; none on a CPU."""
        request = self.request
        times = (stage_time(request, stage, parts) for stage, parts in zip(request.stages, request.parts, strict=True))
        return tuple(time for time in times if time is not None)

    @property
    def seconds(self) -> float | None:
        """Of all stages."""
        return sum(time.total for time in self.times) if self.times else None

    @cached_property
    def traffic(self) -> Traffic:
        """Of a step of the last stage, on the rank that sends most."""
        request, parts = self.request, self.request.parts[-1]
        rank = max(range(len(parts)), key=lambda rank: parts[rank].sent)
        return step_traffic(request, request.stages[-1], rank, parts[rank])


@dataclass(frozen=True, kw_only=True)
class Change:
    """Other settings."""

    flags: str
    """That ask for them."""
    fields: Mapping[str, Any]
    """Of a PlanRequest."""

    def of(self, request: PlanRequest) -> PlanRequest:
        return replace(request, **self.fields)

    def __add__(self, other: "Change") -> "Change":
        return Change(flags=f"{self.flags} {other.flags}", fields={**self.fields, **other.fields})


def nearest(plan: Plan, *, most_ranks: int = MOST_RANKS) -> Change | None:
    """The first change with which a plan fits; None: there is none."""
    return next((change for change in changes(plan.request, most_ranks) if fits_with(plan, change)), None)


def fits_with(plan: Plan, change: Change) -> bool:
    """Whether it does."""
    return replace(plan, request=change.of(plan.request)).fits


def changes(request: PlanRequest, most_ranks: int) -> Iterator[Change]:
    """In the order in which they are tried: what makes another picture comes after what does not, sizes come last."""
    ranks, savings = tuple(_other_ranks(request, most_ranks)), tuple(_savings(request))
    together = tuple(accumulate(savings, add))
    yield from (*ranks, *savings, *together[1:])
    yield from (each + more for each in together[-1:] for more in ranks)
    eight_bits = tuple(_eight_bits(request))
    for smaller_weights in eight_bits:
        yield smaller_weights
        yield from (smaller_weights + each for each in (*ranks, *savings, *together[1:]))
    everything = tuple(each + fewer for each in together[-1:] for fewer in eight_bits) or together[-1:] or eight_bits
    yield from (each + more for each in everything for more in ranks)
    yield from _fewer_images(request)
    yield from _smaller(request)
    yield from (each + smaller for each in everything for smaller in _smaller(request))


def _other_ranks(request: PlanRequest, most: int) -> Iterator[Change]:
    """Twice as many, and so on, on GPUs of their own; on a CPU, whose memory they share, half as many."""
    if not request.on_cuda:
        halves = (request.ranks >> shift for shift in range(1, request.ranks.bit_length()))
        yield from (Change(flags=f"--nproc {ranks}", fields={"ranks": ranks}) for ranks in halves)
        return
    ranks = 1 << request.ranks.bit_length()
    while ranks <= min(most, request.height // request.unit):
        yield Change(flags=f"--nproc {ranks}", fields={"ranks": ranks})
        ranks *= 2


def _savings(request: PlanRequest) -> Iterator[Change]:
    """What takes less memory on as many ranks, for the same picture; a flag that saves memory is a line here."""
    if request.schedule == "stale" and request.ranks > 1:
        yield Change(flags="--schedule sync", fields={"schedule": "sync"})
    if request.gpu is None:
        return
    if request.keep_text_encoder:
        yield Change(flags="without --keep-text-encoder", fields={"keep_text_encoder": False})
    if not request.hoist_modulation:
        yield Change(flags="--hoist-modulation", fields={"hoist_modulation": True})
    if not request.shard_weights and request.ranks > 1:
        yield Change(flags="--shard-weights", fields={"shard_weights": True})
    if not request.offload:
        yield Change(flags="--offload", fields={"offload": True})


def _eight_bits(request: PlanRequest) -> Iterator[Change]:
    """Smaller weights, for a picture that differs a little."""
    if request.gpu is None or request.float8 or request.int8:
        return
    yield Change(flags="--int8", fields={"int8": True})
    if request.gpu.float8 and request.dtype == "bfloat16":
        yield Change(flags="--float8 --compile", fields={"float8": True, "compile": True})


def _fewer_images(request: PlanRequest) -> Iterator[Change]:
    for images in range(request.num_images - 1, 0, -1):
        yield Change(flags=f"--num-images {images}", fields={"num_images": images})


def _smaller(request: PlanRequest) -> Iterator[Change]:
    """Pictures of the same shape, the largest first."""
    unit = request.unit
    for share in range(SIZES_TRIED - 1, 0, -1):
        height, width = (max(1, side * share // SIZES_TRIED // unit) * unit for side in (request.height, request.width))
        if height // unit >= request.ranks:
            flags = f"--res {height}" if height == width else f"--height {height} --width {width}"
            yield Change(flags=flags, fields={"height": height, "width": width})
