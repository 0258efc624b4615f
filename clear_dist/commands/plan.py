"""`clear-dist plan`: what a `generate` would take, before anything is loaded and without a GPU."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

from rich.console import Console

from clear_dist.families.cards import CARDS
from clear_dist.launch import env
from clear_dist.options import Refusal, check_choice, nearest_word, shortened
from clear_dist.plan import GPUS, LINKS, Engine, Gpu, Plan, PlanRequest, Room, fit_here, model, nearest, record
from clear_dist.plan.choice import chosen
from clear_dist.plan.shown import show_plan, show_sweep
from clear_dist.request import devices
from clear_dist.request.flags import PlanFlags
from clear_dist.request.hardware import GB, unknown
from clear_dist.request.settle import choose

NO_FIT = 2
"""Exit status, as for any wrong request."""
SWEPT = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56, 64)


def plan(flags: PlanFlags) -> int:
    """What a `generate` with these flags takes: stripes, memory, bytes, time, and whether it fits. Nothing is loaded.

    The exit status is 0 if it fits, and 2 if it does not.
    """
    first = planned_for(flags)
    try:
        return _swept(flags, first) if flags.sweep else _alone(flags, first)
    finally:
        first.engine.stop()


def planned_for(flags: PlanFlags) -> Plan:
    """The plan of one request, its engine to be stopped by the caller; raises a Refusal where it is wrong."""
    flags = replace(flags, gpu=flags.gpu.lower(), link=flags.link.lower())
    _check_gpu(flags.gpu)
    check_choice("--link", flags.link, ("auto", *LINKS))
    found = devices.find_gpus()[: flags.nproc] if flags.gpu == "auto" and flags.gpu_memory is None else ()
    gpu = _gpu(flags, found)
    device = "cpu" if gpu is None else "cuda"
    place = env.read_for(flags.nproc)
    request, facts, _ = choose(flags, place, CARDS, device=device, gpus=found)
    known = model.find(facts, request.control)
    if known is None:
        raise Refusal(
            "--model must be in a folder, or one whose configuration is known, "
            f"got {flags.model}; nearest: {CARDS.default}"
        )
    word = flags.link
    if word == "auto":
        word = fit_here.ON_CPU if gpu is None else gpu.link
    asked = PlanRequest(request=request, model=known, gpu=gpu, link=LINKS[word], forked=place.launcher is None)
    return Plan(asked=asked, room=_room(gpu, asked.ranks), engine=Engine())


def _alone(flags: PlanFlags, first: Plan) -> int:
    with _at_work():
        first = chosen(first)
        change = None if first.fits else nearest(first)
        values = record.of_plan(first, change)
    return _tell(flags, values, partial(show_plan, plan=first, nearest=change), fits=first.fits)


def _swept(flags: PlanFlags, first: Plan) -> int:
    with _at_work():
        plans = [chosen(plan) for ranks in SWEPT if (plan := _with_ranks(first, ranks)).asked.is_possible]
        values = record.of_sweep(plans)
    return _tell(flags, values, partial(show_sweep, plans=plans), fits=any(each.fits for each in plans))


@contextmanager
def _at_work() -> Iterator[None]:
    """Context in which people see that something is done: the engine takes seconds."""
    if not sys.stderr.isatty():
        yield
        return
    with Console(stderr=True).status("asking the engine what it takes"):
        yield


def _check_gpu(name: str) -> None:
    """Raises a Refusal for a kind that is not in the table; any other can be told by its memory."""
    kinds = ("auto", "cpu", *GPUS)
    if name not in kinds:
        size = name.rstrip("gib ")
        nearest = f"--gpu-memory {size}" if size.isdecimal() else f"{nearest_word(name, kinds)}, or --gpu-memory GB"
        raise Refusal(f"--gpu must be one of {', '.join(kinds)}, got {shortened(name)!r}; nearest: {nearest}")


def _gpu(flags: PlanFlags, found: tuple[devices.FoundGpu, ...]) -> Gpu | None:
    if flags.gpu_memory is not None:
        memory = round(flags.gpu_memory * GB)
        if flags.gpu == "auto":
            return unknown(f"a GPU of {flags.gpu_memory:g} GB", memory)
        return replace(GPUS[flags.gpu], memory=memory)
    if found:
        smallest = min(found, key=lambda each: each.total)
        return replace(fit_here.kind_of(smallest), memory=smallest.total)
    if flags.gpu == "cpu" or (flags.gpu == "auto" and flags.model == "demo"):
        return None
    return next(iter(GPUS.values())) if flags.gpu == "auto" else GPUS[flags.gpu]


def _room(gpu: Gpu | None, ranks: int) -> Room:
    return fit_here.room_of((), ranks) if gpu is None else Room(bytes=gpu.memory, where=gpu.name)


def _with_ranks(first: Plan, ranks: int) -> Plan:
    return replace(first, asked=first.asked.changed(world_size=ranks), room=_room(first.asked.gpu, ranks))


def _tell(flags: PlanFlags, values: dict[str, Any], show: Callable[[Console], None], *, fits: bool) -> int:
    if flags.json:
        print(json.dumps(values, indent=1))
    else:
        show(Console(highlight=False))
    return 0 if fits else NO_FIT
