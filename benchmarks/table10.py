"""The layout of the paper's Table 10: how long does a step take on N ranks?

    python benchmarks/table10.py --folder benchmarks/results/2026-11-21-cpu

Starts one rank for each GPU; on a CPU two, of one thread each. What so many ranks can do is measured. Beside it, and
where there are too few of them, stands what is projected (share.py): one rank's share is measured on one device, and
communication is bytes over a bandwidth, that of --gigabytes-per-second or else the one measured between two ranks.
DistriFusion is full attention in the stale schedule; Ulysses and ring attention are diffusers' own. For each size all
settings take turns; figures are medians. The paper's own figures for this table are not to be had.
"""

import argparse
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from baselines import Baseline
from counts import middle_part, traffic
from diffusers import FluxPipeline
from share import measured_bandwidth, on_stripes, projected, share_of
from steps import Candidate, Runs, interleaved, make_pipeline, peak_rate
from table10_shown import plot, show_all, show_size
from tables import (
    FULL,
    GIGA,
    Cell,
    Limits,
    Origin,
    Setting,
    cell_of,
    free_bytes,
    machine,
    model_and_dtype,
    parser_of,
    save,
    settings_of,
    stale_bytes,
    windows,
    work_of,
)

from clear_dist.comm import env, launch
from clear_dist.comm.group import Group

DISTRIFUSION = Setting(name="full attention, DistriFusion", window="full", schedule="stale")
BASELINES = {kind: Setting(name=f"full attention, {kind}", window="full") for kind in ("Ulysses", "ring")}
NVLINK = 450.0
"""GB/s each way of an H100, where nothing else is stated and there is one GPU."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a measurement goes in the table."""

    setting: Setting
    ranks: int
    is_share: bool = False
    """One rank's share, for a projection."""


@dataclass(kw_only=True)
class Bench:
    """What all measurements of this rank need."""

    options: argparse.Namespace
    pipe: FluxPipeline
    world: Group
    groups: dict[int, Group]
    """Of the first so many ranks; this rank is not in those that are smaller than its number."""
    baselines: dict[Place, Baseline]
    limits: Limits
    bytes_per_second: float


def main() -> None:
    parser = parser_of(__doc__)
    devices = torch.cuda.device_count() or 2
    parser.add_argument("--ranks", type=int, default=devices, help="to start, each with a GPU or a core of its own")
    parser.add_argument("--numbers", type=int, nargs="+", default=[1, 2, 4, 8], help="of ranks, columns of the table")
    parser.add_argument("--threads", type=int, default=1, help="of each rank on a CPU")
    parser.add_argument("--gigabytes-per-second", type=float, help="each way through a rank's link, for projections")
    options = parser.parse_args()
    if options.gigabytes_per_second is None and options.ranks == 1 and options.device == "cpu":
        parser.error("one rank cannot measure a bandwidth: state --gigabytes-per-second")
    on_cuda = options.device == "cuda"
    raise SystemExit(launch.run(partial(work, options), nproc=options.ranks, on_cuda=on_cuda, traceback=True))


def work(options: argparse.Namespace) -> None:
    """What each rank does."""
    torch.set_num_threads(options.threads)
    device = torch.device("cuda", env.read().local_rank) if options.device == "cuda" else torch.device("cpu")
    world = Group.create(device, timeout_seconds=7200.0)
    bench = prepare(options, world)
    header: dict[str, Any] = {
        "machine": machine(device),
        "settings": settings_of(options),
        "model": vars(bench.limits.model),
        "peak": bench.limits.peak_rate,
        "gigabytes_per_second": bench.bytes_per_second / GIGA,
        "bandwidth": "stated" if options.gigabytes_per_second or world.size == 1 else "measured",
    }
    cells: list[Cell] = []
    for side in options.sides:
        found = measure(side, bench)
        cells += found
        if world.rank == 0:  # after each size: the next may take hours
            header["peak"] = max(header["peak"], peak_rate(device, bench.pipe.transformer.dtype))
            show_size(found, header)
        if world.rank == 0 and options.folder is not None:
            save(options.folder, "table10", header, cells)
            plot(cells, header, options.folder / "table10.png")
    if world.rank == 0:
        show_all(cells)
    world.barrier()
    world.close()


def prepare(options: argparse.Namespace, world: Group) -> Bench:
    (model, dtype), first = model_and_dtype(options), world.rank == 0
    pipe = make_pipeline(model, world.device, dtype)
    numbers = sorted({number for number in (*options.numbers, 2) if number <= world.size})
    groups = {number: world.split(number) if number < world.size else world for number in numbers}
    # One rank at a time, and the same figures on all: what is left out follows from them.
    peak, free = world.broadcast_object((peak_rate(world.device, dtype), free_bytes(world.device)) if first else None)
    return Bench(
        options=options,
        pipe=pipe,
        world=world,
        groups=groups,
        baselines=make_baselines(pipe, [number for number in numbers if number > 1], world),
        limits=Limits(model, options.cell_seconds, options.repetitions, peak, free),
        bytes_per_second=bandwidth(options, groups, world),
    )


def make_baselines(pipe: FluxPipeline, numbers: list[int], world: Group) -> dict[Place, Baseline]:
    return {
        Place(setting=setting, ranks=number): Baseline(pipe, kind, number, world)
        for kind, setting in BASELINES.items()
        for number in numbers
        if not world.size % number
    }


def bandwidth(options: argparse.Namespace, groups: dict[int, Group], world: Group) -> float:
    """In bytes per second."""
    if options.gigabytes_per_second is not None:
        return GIGA * options.gigabytes_per_second
    if world.size == 1:
        return GIGA * NVLINK
    mine = measured_bandwidth(groups[2]) if world.rank < 2 else None
    return world.broadcast_object(mine)


def measure(side: int, bench: Bench) -> list[Cell]:
    """All cells of one size."""
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
    found: list[Runs] = interleaved(
        list(candidates.values()), bench.world, limits.model.text_tokens, limits.repetitions
    )
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
    names = [setting.name for setting in (FULL, DISTRIFUSION, *BASELINES.values(), *settings(bench))]
    return sorted(cells, key=lambda cell: (names.index(cell.setting), cell.ranks, cell.origin == "projected"))


def places(bench: Bench) -> Iterator[Place]:
    """All that is to be measured for one size."""
    for ranks in bench.options.numbers:
        for setting in settings(bench):
            for is_share in (False, True):
                place = Place(setting=setting, ranks=ranks, is_share=is_share)
                there_are = ranks > 1 if is_share else ranks <= bench.world.size
                if there_are and stands_for(place, bench)[0] == setting:
                    yield place
        if ranks > 1:
            yield from (Place(setting=setting, ranks=ranks) for setting in BASELINES.values())


def settings(bench: Bench) -> list[Setting]:
    radii = bench.options.radii
    return [FULL, DISTRIFUSION, *windows(radii), *windows(radii, "stale")]


def stands_for(place: Place, bench: Bench) -> list[Setting]:
    """The settings that a measurement serves: one rank waits for nobody, and a share does not exchange anything."""
    if place.ranks == 1 or (place.is_share and place.setting.window != "full"):
        return [setting for setting in settings(bench) if setting.window == place.setting.window]
    return [place.setting]


def why_not(place: Place, side: int, bench: Bench) -> tuple[Origin, str] | None:
    if place.setting in BASELINES.values() and place not in bench.baselines:
        return "not possible", f"it takes {place.ranks} devices or a multiple, here are {bench.world.size}"
    part = middle_part(side, place.ranks, place.setting.window)
    on_one_machine = 1 if bench.options.device == "cuda" else processes_of(place, bench)
    return bench.limits.why_not(place.setting, part, steps=unmeasured_of(place) + 1, processes=on_one_machine)


def candidate_of(place: Place, side: int, bench: Bench) -> Candidate:
    processes = processes_of(place, bench)
    may_fail = processes == 1 or place in bench.baselines  # these fail on all ranks, or on none
    return Candidate(
        prepare=partial(prepared, place, side, bench),
        side=side,
        processes=processes,
        unmeasured=unmeasured_of(place),
        may_fail=may_fail,
    )


def prepared(place: Place, side: int, bench: Bench) -> AbstractContextManager[FluxPipeline]:
    setting = place.setting
    if place in bench.baselines:
        return bench.baselines[place].ready()
    if place.is_share:
        return share_of(bench.pipe, middle_part(side, place.ranks, setting.window), setting.schedule)
    if place.ranks == 1 and setting.window == "full":
        return nullcontext(bench.pipe)  # as diffusers made it
    return on_stripes(bench.pipe, setting.window, setting.schedule, bench.groups[place.ranks])


def processes_of(place: Place, bench: Bench) -> int:
    if place in bench.baselines:
        return bench.world.size
    return 1 if place.is_share else place.ranks


def unmeasured_of(place: Place) -> int:
    return 1 if place.is_share else place.setting.unmeasured


def named(cell: Cell, setting: Setting) -> Cell:
    return replace(cell, setting=setting.name, window=setting.window)


def projection(share: Cell, setting: Setting, bench: Bench) -> Cell:
    """The cell of all ranks, from that of one's share."""
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


if __name__ == "__main__":
    main()
