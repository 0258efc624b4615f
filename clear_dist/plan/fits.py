"""A plan: whether a request fits, and if not, the nearest settings that do."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from operator import add
from typing import Any

from clear_dist.plan.asked import Part, PlanRequest
from clear_dist.plan.engine import Engine
from clear_dist.plan.phases import SHARED, Memory, Phase, RankMemory
from clear_dist.plan.timing import StageTime, stage_time
from clear_dist.plan.traffic import Traffic, step_traffic

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
    """What comes of a request; its figures raise a Refusal where the model cannot be built."""

    asked: PlanRequest
    room: Room
    engine: Engine

    @property
    def memory(self) -> Memory:
        return Memory(asked=self.asked, engine=self.engine)

    @cached_property
    def ranks(self) -> tuple[RankMemory, ...]:
        return tuple(map(self.memory.of_rank, range(self.asked.ranks)))

    @property
    def largest(self) -> RankMemory:
        """The rank with the highest peak."""
        return max(self.ranks, key=lambda memory: memory.peak)

    @cached_property
    def highest(self) -> int:
        """Bytes of the highest peak of all ranks."""
        return max(phase.total for phase in self._highest())

    @cached_property
    def needed(self) -> int:
        """Bytes where ranks share their room: the largest ones together, what they have in common once."""
        if self._together == 1:
            return self.highest
        shared = SHARED if self.asked.forked and not self.asked.on_cuda else 0
        return max(sum(phase.total for phase in phases) for phases in self._at_once) - (self._together - 1) * shared

    @property
    def fits(self) -> bool:
        if not self.asked.is_possible or self._least > self.room.bytes:
            return False
        return self.needed <= self.room.bytes

    @property
    def is_refused(self) -> bool:
        """Whether it does not fit even if ranks share what they can and the estimate is as high above as it may be."""
        return (self.needed - self._shareable) * (1 - ERROR) > self.room.bytes

    @property
    def _together(self) -> int:
        """Ranks in the same room."""
        return min(self.room.sharing, self.asked.request.world_size)

    @property
    def _least(self) -> int:
        """Bytes that one rank needs before a step is taken, or even the engine asked about one."""
        return max(phase.total for phase in self.memory.before(0))

    @property
    def _stages(self) -> Iterator[int]:
        """Stages of which no later one takes more."""
        stages, last = self.asked.stages, self.asked.stages[-1]
        for number, stage in enumerate(stages):
            is_smaller = stage.height <= last.height and stage.width <= last.width and stage.ranks is None
            takes_less = stage.sampling.passes <= last.sampling.passes and (
                self.asked.lags(last, self.asked.ranks) or not self.asked.lags(stage, self.asked.ranks)
            )
            if number == len(stages) - 1 or not (is_smaller and takes_less):
                yield number

    def _highest(self) -> Iterator[Phase]:
        """Phases among which the highest of all is: in ranks and stages that no other covers."""
        for rank in {0, self.asked.ranks - 1}:
            yield from self.memory.before(rank)
        for number in self._stages:
            parts = self.asked.parts[number]
            for part in parts:
                has_more = part.rank == 0 and self.asked.request.keep_text_encoder
                if has_more or not any(other.covers(part) and not _later_equal(other, part) for other in parts):
                    yield from self.memory.of_stage(part.rank, number)

    @property
    def _at_once(self) -> tuple[list[Phase], list[Phase]]:
        """The phases that ranks in one room may be in together, before anything is drawn and then."""
        ranks, of_stage = list(range(self.asked.ranks)) * self.asked.request.data_ranks, self.memory.of_stage
        drawing = ([phase for number in self._stages for phase in of_stage(rank, number)] for rank in ranks)
        return (
            self._largest(_highest_of(self.memory.before(rank)) for rank in ranks),
            self._largest(map(_highest_of, drawing)),
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
        """One a stage; none without known rates."""
        times = (stage_time(self.engine, self.asked, number) for number in range(len(self.asked.stages)))
        return tuple(time for time in times if time is not None)

    @property
    def seconds(self) -> float | None:
        """All stages together."""
        return sum(time.total for time in self.times) if self.times else None

    @cached_property
    def traffic(self) -> Traffic:
        """A step of the last stage, on the rank that sends most."""
        part = max(self.asked.parts[-1], key=lambda part: part.sent)
        return step_traffic(self.engine, self.asked, self.asked.stages[-1], part)


def _highest_of(phases: Iterable[Phase]) -> Phase:
    return max(phases, key=lambda phase: phase.total)


def _later_equal(part: Part, other: Part) -> bool:
    """Whether both cover each other, and `other` comes first, or is the same."""
    return other.covers(part) and other.rank <= part.rank


@dataclass(frozen=True, kw_only=True)
class Change:
    """Other settings."""

    flags: str
    """On the command line."""
    fields: Mapping[str, Any]
    """In a Request."""

    def of(self, asked: PlanRequest) -> PlanRequest:
        return asked.changed(**self.fields)

    def __add__(self, other: "Change") -> "Change":
        return Change(flags=f"{self.flags} {other.flags}", fields={**self.fields, **other.fields})


def nearest(plan: Plan, *, most_ranks: int = MOST_RANKS) -> Change | None:
    """The first change with which a plan fits; None: there is none."""
    found = (_first_that_fits(plan, group) for group in groups(plan.asked, most_ranks))
    return next((change for change in found if change is not None), None)


def _first_that_fits(plan: Plan, group: Sequence[Change]) -> Change | None:
    """Bisects the group: each takes less than the one before."""
    if not group or not fits_with(plan, group[-1]):
        return None
    low, high = 0, len(group) - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fits_with(plan, group[middle]) else (middle + 1, high)
    return group[low]


def fits_with(plan: Plan, change: Change) -> bool:
    return replace(plan, asked=change.of(plan.asked)).fits


def groups(asked: PlanRequest, most_ranks: int) -> Iterator[Sequence[Change]]:
    """Changes in the order they are tried: what makes another picture comes after what does not, sizes come last.

    Each change of a group takes less memory than the one before.
    """
    ranks, savings = tuple(_other_ranks(asked, most_ranks)), tuple(_savings(asked))
    together = tuple(accumulate(savings, add))
    without = [ranks, *_singly(savings), *_singly(together[1:])]
    yield from without
    yield from (_each(each, ranks) for each in together[-1:])
    eight_bits = tuple(_eight_bits(asked))
    for smaller_weights in eight_bits:
        yield (smaller_weights,)
        yield from (_each(smaller_weights, group) for group in without)
    everything = tuple(each + fewer for each in together[-1:] for fewer in eight_bits) or together[-1:] or eight_bits
    yield from (_each(each, ranks) for each in everything)
    yield tuple(_fewer_images(asked))
    smaller = tuple(_smaller(asked))
    yield smaller
    yield from (_each(each, smaller) for each in everything)


def _singly(changes: Iterable[Change]) -> Iterator[Sequence[Change]]:
    return ((change,) for change in changes)


def _each(first: Change, group: Sequence[Change]) -> Sequence[Change]:
    return tuple(first + each for each in group)


def _other_ranks(asked: PlanRequest, most: int) -> Iterator[Change]:
    """Twice as many, and so on, on GPUs of their own; on a CPU, whose memory they share, half as many."""
    if not asked.on_cuda:
        yield from (_on_ranks(asked, ranks) for ranks in halves(asked.ranks))
        return
    ranks = 1 << asked.ranks.bit_length()
    while ranks * asked.request.data_ranks <= most and ranks <= asked.request.most_ranks(asked.request.size):
        yield _on_ranks(asked, ranks)
        ranks *= 2


def _on_ranks(asked: PlanRequest, ranks: int) -> Change:
    """Change to `ranks` ranks for a picture, in each group of data."""
    everyone = ranks * asked.request.data_ranks
    return Change(flags=f"--nproc {everyone}", fields={"world_size": everyone})


def halves(ranks: int) -> Iterator[int]:
    """Half of `ranks`, a quarter and so on, rounded down, to 1."""
    return (ranks >> shift for shift in range(1, ranks.bit_length()))


def _savings(asked: PlanRequest) -> Iterator[Change]:
    """What takes less memory on as many ranks, for the same picture; a flag that saves memory is a line here."""
    request = asked.request
    if request.schedule == "stale" and asked.ranks > 1:
        yield Change(flags="--schedule sync", fields={"schedule": "sync"})
    if not asked.on_cuda:
        return
    if request.keep_text_encoder:
        yield Change(flags="without --keep-text-encoder", fields={"keep_text_encoder": False})
    if asked.model.hoists_modulation and not request.hoist_modulation:
        yield Change(flags="--hoist-modulation", fields={"hoist_modulation": True})
    if not request.shard_weights and asked.ranks > 1:
        yield Change(flags="--shard-weights", fields={"shard_weights": True})
    if not request.offload:
        yield Change(flags="--offload", fields={"offload": True})


def _eight_bits(asked: PlanRequest) -> Iterator[Change]:
    """Smaller weights, for a picture that differs a little."""
    if asked.gpu is None or asked.request.float8 or asked.request.int8:
        return
    yield Change(flags="--int8", fields={"int8": True})
    if asked.gpu.float8 and asked.request.dtype == "bfloat16":
        yield Change(flags="--float8 --compile", fields={"float8": True, "compile": True})


def _fewer_images(asked: PlanRequest) -> Iterator[Change]:
    for images in range(asked.request.num_images - 1, 0, -1):
        yield Change(flags=f"--num-images {images}", fields={"num_images": images})


def _smaller(asked: PlanRequest) -> Iterator[Change]:
    """Pictures of the same shape, the largest first."""
    unit = asked.request.unit
    for share in range(SIZES_TRIED - 1, 0, -1):
        height, width = (max(1, side * share // SIZES_TRIED // unit) * unit for side in asked.request.size)
        if asked.request.most_ranks((height, width)) >= asked.ranks:
            flags = f"--res {height}" if height == width else f"--height {height} --width {width}"
            yield Change(flags=flags, fields={"height": height, "width": width})
