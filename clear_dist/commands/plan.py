"""`clear-dist plan`: what a `generate` would take, before anything is loaded and without a GPU."""

import json
from dataclasses import replace
from typing import Any

from rich.console import Console

from clear_dist.families.cards import CARDS
from clear_dist.launch import env
from clear_dist.options import Refusal, check_choice
from clear_dist.plan import GPUS, LINKS, Gpu, Plan, Room, fit_here, nearest, planned, record, sizes
from clear_dist.plan.shown import show_plan, show_sweep
from clear_dist.request import devices
from clear_dist.request.flags import PlanFlags
from clear_dist.request.settle import choose

NO_FIT = 2
"""Exit status, as for any wrong request."""
SWEPT = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56, 64)


def plan(flags: PlanFlags) -> int:
    """What a `generate` with these flags takes: stripes, memory, bytes, time, and whether it fits. Nothing is loaded.

    The exit status is 0 if it fits, and 2 if it does not.
    """
    first = planned_for(flags)
    if not flags.sweep:
        change = None if first.fits else nearest(first)
        return _tell(flags, show_plan, record.of_plan, first, change, fits=first.fits)
    plans = [plan for ranks in SWEPT if (plan := _with_ranks(first, ranks)).request.is_possible]
    return _tell(flags, show_sweep, record.of_sweep, plans, fits=any(each.fits for each in plans))


def planned_for(flags: PlanFlags) -> Plan:
    """The plan of one request; raises a Refusal where it is wrong, or the sizes of its model are not known."""
    flags = replace(flags, gpu=flags.gpu.lower(), link=flags.link.lower())
    check_choice("--gpu", flags.gpu, ("auto", "cpu", *GPUS))
    check_choice("--link", flags.link, ("auto", *LINKS))
    found = devices.find_gpus() if flags.gpu == "auto" else ()
    gpu = _gpu(flags, found)
    device = "cpu" if gpu is None else "cuda"
    place = env.read()
    request, facts, _ = choose(flags, place, CARDS, device=device, gpus=len(found))
    known = sizes.find(facts)
    if known is None:
        raise Refusal(
            "--model must be in a folder, or one whose configuration is known, "
            f"got {flags.model}; nearest: {CARDS.default}"
        )
    word = flags.link
    if word == "auto":
        word = fit_here.ON_CPU if gpu is None else gpu.link
    whole = planned.of_request(request, known, gpu, LINKS[word], place)
    return Plan(request=whole, room=_room(gpu, whole.ranks))


def _gpu(flags: PlanFlags, found: tuple[devices.FoundGpu, ...]) -> Gpu | None:
    if found:
        return replace(fit_here.kind_of(found[0]), memory=found[0].total)
    if flags.gpu == "cpu" or (flags.gpu == "auto" and flags.model == "demo"):
        return None
    return next(iter(GPUS.values())) if flags.gpu == "auto" else GPUS[flags.gpu]


def _room(gpu: Gpu | None, ranks: int) -> Room:
    return fit_here.room_of((), ranks) if gpu is None else Room(bytes=gpu.memory, where=gpu.name)


def _with_ranks(first: Plan, ranks: int) -> Plan:
    return Plan(request=replace(first.request, ranks=ranks), room=_room(first.request.gpu, ranks))


def _tell(flags: PlanFlags, shown: Any, recorded: Any, *about: Any, fits: bool) -> int:
    if flags.json:
        print(json.dumps(recorded(*about), indent=1))
    else:
        shown(Console(highlight=False), *about)
    return 0 if fits else NO_FIT
