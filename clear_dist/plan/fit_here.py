"""Whether a request fits in the memory that is free here, before anything is loaded."""

from dataclasses import replace
from math import ceil

from clear_dist.cards.folder import ModelFacts
from clear_dist.launch.env import Place
from clear_dist.observe.memory import free_bytes
from clear_dist.options import Refusal
from clear_dist.plan import LINKS, Gpu, Plan, Room, nearest, planned, sizes
from clear_dist.request import devices
from clear_dist.request.hardware import named_like, unknown
from clear_dist.request.request import Request

WARNING = "warning: "
ON_CPU = "memory"
"""The link of ranks that share a host's memory."""


def require(request: Request, facts: ModelFacts, place: Place) -> tuple[str, ...]:
    """A warning where it may not fit; nothing where it does, or where nobody can know by now.

    Raises:
        Refusal: it does not fit, even if the estimate is too high by as much as it may be.
    """
    known = sizes.find(facts)
    # One process of a machine looks, before any of its ranks has loaded something.
    if known is None or request.height is None or place.local_rank:
        return ()
    ranks = place.local_world_size if place.launcher else request.world_size
    gpus = devices.find_gpus() if request.device == "cuda" else ()
    if request.device == "cuda" and not gpus:
        return ()
    gpu, room = kind_of(gpus[0]) if gpus else None, room_of(gpus, ranks)
    wanted = planned.of_request(request, known, gpu, LINKS[ON_CPU if gpu is None else gpu.link], place)
    if gpus and room.sharing > 1 and wanted.text_sharding == "auto":  # through host memory text is not shared
        wanted = replace(wanted, text_sharding="replicated")
    plan = Plan(request=wanted, room=room)
    if plan.is_refused:
        change = nearest(plan, most_ranks=len(gpus) or 1)
        settings = change.flags if change is not None else "a smaller model"
        raise Refusal(f"{_shown(plan)}; nearest: {settings} (clear-dist plan tells more)")
    return () if plan.fits else (f"{WARNING}{_shown(plan)}, by an estimate that may be 10 % too high",)


def room_of(gpus: tuple[devices.FoundGpu, ...], ranks: int) -> Room:
    """What so many ranks find on this machine.

    Args:
        gpus: none: they are on the CPU.
    """
    if not gpus:
        return Room(bytes=free_bytes(), where="this machine", sharing=ranks)
    used = gpus[:ranks]
    fullest = min(range(len(used)), key=lambda number: used[number].free)
    return Room(bytes=used[fullest].free, where=f"GPU {fullest}", sharing=ceil(ranks / len(gpus)))


def kind_of(found: devices.FoundGpu) -> Gpu:
    """A GPU of this machine, with the rates of its kind."""
    return named_like(found.name) or unknown(found.name, found.total)


def _shown(plan: Plan) -> str:
    together = f"{plan.room.sharing} ranks" if plan.room.sharing > 1 else f"rank {plan.largest.rank}"
    needed, free = (f"{amount / 1e9:.1f} GB" for amount in (plan.needed, plan.room.bytes))
    return f"{together} must fit in the {free} that are free on {plan.room.where}, got {needed}"
