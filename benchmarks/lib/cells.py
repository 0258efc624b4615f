"""Measurement of the cells of Tables 7 and 10 for one size of image: who runs on how many ranks, in which turn."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property, partial

from diffusers import FluxPipeline

from benchmarks.lib.baselines import Baseline, stock
from benchmarks.lib.counts import middle_part, traffic
from benchmarks.lib.share import on_stripes, projected, share_of
from benchmarks.lib.steps import Candidate, interleaved
from benchmarks.lib.tables import FULL, Cell, Limits, Origin, Setting, cell_of, stale_bytes, work_of
from clear_dist.comm.group import Group

DISTRIFUSION = Setting(name="full attention, DistriFusion", window="full", schedule="stale")
BASELINES = {kind: Setting(name=f"full attention, {kind}", window="full") for kind in ("Ulysses", "ring")}


@dataclass(frozen=True, kw_only=True)
class Place:
    """A measurement's place in the table."""

    setting: Setting
    ranks: int
    is_share: bool = False
    """Whether one rank's share is measured, for a projection."""


@dataclass(kw_only=True)
class Bench:
    """The shared inputs of this rank's measurements."""

    pipe: FluxPipeline
    world: Group
    limits: Limits
    settings: Sequence[Setting]
    """Settings of the engine; full attention on one rank is diffusers' own."""
    numbers: Sequence[int] = (1,)
    """Numbers of ranks: the columns."""
    groups: dict[int, Group] = field(default_factory=dict)
    """Groups of the first n ranks, by n; this rank is not in those with n <= its number."""
    baselines: dict[Place, Baseline] = field(default_factory=dict)
    bytes_per_second: float = float("inf")
    """Bandwidth each way of a rank's link, for projections."""
    compile: bool = False
    """Whether everyone's blocks are compiled."""

    @cached_property
    def stock(self) -> FluxPipeline:
        return stock(self.pipe, compile=self.compile)

    @property
    def share_memory(self) -> bool:
        return self.world.device.type == "cpu"


def measure(side: int, bench: Bench) -> list[Cell]:
    """All cells of one size; all ranks call this."""
    cells: list[Cell] = []
    candidates: dict[Place, Candidate] = {}
    for place in places(bench):
        reason = why_not(place, side, bench)
        if reason is None:
            candidates[place] = candidate_of(place, side, bench)
        else:
            empty = Cell(setting="", window="full", side=side, ranks=place.ranks, origin=reason[0], note=reason[1])
            cells += [named(empty, setting) for setting in stands_for(place, bench)]
    limits = bench.limits
    found = interleaved(list(candidates.values()), bench.world, limits.model.text_tokens, limits.repetitions)
    for place, runs in zip(candidates, found, strict=True):
        cell = cell_of(place.setting, side, place.ranks, runs, limits.model)
        if place in bench.baselines:  # unlike ours, these cut the text too
            whole = work_of(limits.model, middle_part(side, 1, place.setting.window))
            cell = replace(cell, work=whole // place.ranks)
        else:
            limits.learn(place.setting.window, cell)
        for setting in stands_for(place, bench):
            its = named(cell, setting)
            cells.append(projection(its, setting, bench) if place.is_share and runs.seconds else its)
    names = [setting.name for setting in (FULL, DISTRIFUSION, *BASELINES.values(), *bench.settings)]
    return sorted(cells, key=lambda cell: (names.index(cell.setting), cell.ranks, cell.origin == "projected"))


def places(bench: Bench) -> Iterator[Place]:
    """All measurements of one size."""
    for ranks in bench.numbers:
        for setting in bench.settings:
            for is_share in (False, True):
                place = Place(setting=setting, ranks=ranks, is_share=is_share)
                there_are = ranks > 1 if is_share else ranks <= bench.world.size
                if there_are and stands_for(place, bench)[0] == setting:
                    yield place
        if ranks > 1:
            yield from (Place(setting=setting, ranks=ranks) for setting in BASELINES.values())


def stands_for(place: Place, bench: Bench) -> list[Setting]:
    """Settings that one measurement serves: on one rank all schedules are the same."""
    if place.ranks == 1:
        return [setting for setting in bench.settings if setting.window == place.setting.window]
    return [place.setting]


def why_not(place: Place, side: int, bench: Bench) -> tuple[Origin, str] | None:
    """Origin and note of a cell that is not measured; None for one that is."""
    if place.setting in BASELINES.values() and place not in bench.baselines:
        return "not possible", f"it takes {place.ranks} devices or a multiple, here are {bench.world.size}"
    part = middle_part(side, place.ranks, place.setting.window)
    if part.grid[0] < place.ranks:
        return "not possible", f"{part.grid[0]} rows of tokens are fewer than {place.ranks} ranks"
    processes = processes_of(place, bench) if bench.share_memory else 1
    return bench.limits.why_not(place.setting, part, steps=unmeasured_of(place) + 1, processes=processes)


def candidate_of(place: Place, side: int, bench: Bench) -> Candidate:
    processes = processes_of(place, bench)
    return Candidate(
        prepare=partial(prepared, place, side, bench),
        side=side,
        processes=processes,
        unmeasured=unmeasured_of(place),
        # Baselines fail on all ranks, or on none.
        may_fail=processes == 1 or place in bench.baselines,
    )


def prepared(place: Place, side: int, bench: Bench) -> AbstractContextManager[FluxPipeline]:
    setting = place.setting
    if place in bench.baselines:
        return bench.baselines[place].ready()
    if place.is_share:
        part = middle_part(side, place.ranks, setting.window)
        return share_of(bench.pipe, part, setting.schedule, bench.limits.model.text_tokens, compile=bench.compile)
    if place.ranks == 1 and setting.window == "full":
        return nullcontext(bench.stock)
    return on_stripes(bench.pipe, setting.window, setting.schedule, bench.groups[place.ranks], compile=bench.compile)


def processes_of(place: Place, bench: Bench) -> int:
    if place in bench.baselines:
        return bench.world.size
    return 1 if place.is_share else place.ranks


def unmeasured_of(place: Place) -> int:
    return 1 if place.is_share else place.setting.unmeasured


def named(cell: Cell, setting: Setting) -> Cell:
    return replace(cell, setting=setting.name, window=setting.window)


def projection(share: Cell, setting: Setting, bench: Bench) -> Cell:
    """The cell of all ranks, projected from one rank's share."""
    model, speed = bench.limits.model, bench.bytes_per_second
    part = middle_part(share.side, share.ranks, setting.window)
    moved = traffic(model, part, setting.schedule)
    return replace(
        share,
        origin="projected",
        seconds=[projected(seconds, moved, setting.schedule, speed) for seconds in share.seconds],
        peak_bytes=share.peak_bytes + stale_bytes(model, part, setting.schedule),
        share_seconds=share.seconds,
        link_bytes=moved.in_layers + moved.at_the_end,
    )
