"""Whether a request fits in the memory that is free here, found out beside the start of its ranks."""

import os
from dataclasses import dataclass, replace
from functools import cached_property
from math import ceil, prod

from clear_dist.cards.card import TransformerShape
from clear_dist.cards.controlnets import ControlNetShape
from clear_dist.cards.folder import ModelFacts
from clear_dist.families.cards import CARDS
from clear_dist.launch.ends import say
from clear_dist.launch.env import Place
from clear_dist.observe.memory import free_bytes
from clear_dist.options import Refusal
from clear_dist.plan import LINKS, Change, Engine, Gpu, Plan, PlanRequest, Room, model, nearest
from clear_dist.plan.choice import Fewer, Halves, fewer_ranks, halves_of
from clear_dist.request import devices
from clear_dist.request.controlnet import folder_of, shape_of
from clear_dist.request.hardware import FLOAT8_CAPABILITY, named_like, unknown
from clear_dist.request.request import Request

WARNING = "warning: "
ON_CPU = "memory"
"""The link of ranks that share a host's memory."""
MOST_PER_PIXEL, MOST_BESIDES = 2**14, 2**31
"""Bytes, several times what any rank takes for its activations, halos and scores: below these nobody need ask."""


class Unfit(Refusal):
    """A request that does not fit; settings that do are looked for when its words are asked for, as that takes long."""

    def __init__(self, check: "Check") -> None:
        super().__init__()
        self._check = check

    def __str__(self) -> str:
        return self._words

    @cached_property
    def _words(self) -> str:
        plan = self._check.plan
        change = self._check.emptier() or nearest(plan, most_ranks=len(self._check.gpus) or 1)
        plan.engine.stop()
        settings = change.flags if change is not None else "a smaller model"
        return f"{_shown(plan)}; nearest: {settings} (clear-dist plan tells more)"


@dataclass(frozen=True, kw_only=True)
class Check:
    """A plan whose engine is at work."""

    plan: Plan
    gpus: tuple[devices.FoundGpu, ...]
    ranks: int
    """Number of them on this machine."""
    is_launched: bool
    """Whether there are so many for good."""

    def line(self) -> str | None:
        """A warning where it may not fit, or nobody knows; waits for the engine.

        Raises:
            Refusal: it does not fit, even if the estimate is too high by as much as it may be.
        """
        plan = self.plan
        try:
            is_refused, fits = plan.is_refused, plan.fits
        except (Refusal, RuntimeError) as error:  # loading tells what is wrong with the model, if anything
            plan.engine.stop()
            return f"{WARNING}whether it fits is not known: {error}"
        if is_refused:
            raise Unfit(self)
        plan.engine.stop()
        return None if fits else f"{WARNING}{_shown(plan)}, by an estimate that may be 10 % too high"

    def emptier(self) -> Change | None:
        """The GPUs here that have room, where others of them have not and fewer ranks fit too."""
        plan = self.plan
        kept = [number for number, gpu in enumerate(self.gpus) if gpu.free >= plan.needed]
        ranks = min(self.ranks, len(kept))
        if not kept or (self.is_launched and ranks < self.ranks):
            return None
        words = (os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(len(self.gpus))))).split(",")
        flags = f"CUDA_VISIBLE_DEVICES={','.join(words[number] for number in kept)}"
        fewer = Change(flags=f"{flags} and --nproc {ranks}", fields={"world_size": ranks})
        change = fewer if ranks < self.ranks else Change(flags=flags, fields={})
        room = room_of(tuple(self.gpus[number] for number in kept), ranks)
        asked = replace(change.of(plan.asked), shares_gpus=False)
        return change if replace(plan, asked=asked, room=room).fits else None

    def require(self) -> None:
        """Tell people the warning, if any; raises as `line`."""
        if (line := self.line()) is not None:
            say(line)


def begin(request: Request, facts: ModelFacts, place: Place, room: Room | None = None) -> Check | None:
    """Begin to find out; None where it fits by far, or where nobody can know by now.

    Args:
        room: what there was before the model was loaded, where it is; None: nothing is loaded.
    """
    known = model.find(facts, request.control)
    # One process of a machine looks, before any of its ranks has loaded something.
    if known is None or request.height is None or place.local_rank:
        return None
    ranks = place.local_world_size if place.launcher else request.world_size
    gpus = devices.find_gpus() if request.device == "cuda" else ()
    if request.device == "cuda" and not gpus:
        return None
    gpu, room = kind_of(gpus[0]) if gpus else None, room or room_of(gpus, ranks)
    asked = PlanRequest(
        request=request,
        model=known,
        gpu=gpu,
        link=LINKS[ON_CPU if gpu is None else gpu.link],
        forked=place.launcher is None,
        shares_gpus=bool(gpus) and room.sharing > 1,
    )
    if facts.shape is not None and fits_by_far(asked, room, numbers_in(request, facts)):
        return None
    plan = Plan(asked=asked, room=room, engine=Engine())
    return Check(plan=plan, gpus=gpus, ranks=ranks, is_launched=place.launcher is not None)


def chosen_here(request: Request, facts: ModelFacts, place: Place) -> tuple[Halves | None, tuple[Fewer, ...]]:
    """Halves for guidance, and stages that fewer ranks draw, where that is sooner on GPUs of this kind; or none.

    Stages of each picture, so that it is drawn among others as it is alone. It takes seconds.
    """
    known, gpus = model.find(facts, request.control), devices.find_gpus()
    if known is None or not gpus:
        return None, ()
    ranks = place.local_world_size if place.launcher else request.world_size
    smallest = min(gpus[:ranks], key=lambda each: each.total)
    gpu = kind_of(smallest)
    shares = ranks > len(gpus)
    asked = PlanRequest(request=request, model=known, gpu=gpu, link=LINKS[gpu.link], shares_gpus=shares)
    plan = Plan(asked=asked, room=Room(bytes=smallest.total, where=gpu.name), engine=Engine())
    pictures = {alone.stages: alone for alone in map(request.alone, range(len(request.prompts)))}
    try:
        halves = halves_of(plan)
        guidance = request.guidance_ranks if halves is None else 2
        requests = (replace(alone, guidance_ranks=guidance) for alone in pictures.values())
        plans = (replace(plan, asked=replace(asked, request=each)) for each in requests)
        return halves, tuple({fewer.size: fewer for each in plans for fewer in fewer_ranks(each)}.values())
    except (Refusal, RuntimeError) as error:  # loading tells what is wrong with the model, if anything
        say(f"{WARNING}all ranks draw every stage, as whether fewer would be sooner is not known: {error}")
        return None, ()
    finally:
        plan.engine.stop()


def numbers_in(request: Request, facts: ModelFacts) -> int:
    """Numbers of the weights of transformer and ControlNet, which are known."""
    shapes: list[TransformerShape | ControlNetShape | None] = [facts.shape]
    if request.control is not None:
        shapes.append(shape_of(request.control, folder_of(request.control), facts, CARDS))
    return sum(prod(shape) for model in shapes if model is not None for shape in model.tensors().values())


def fits_by_far(asked: PlanRequest, room: Room, numbers: int) -> bool:
    """Whether even a bound that is far too high is below what is free; `numbers`: of the models' weights."""
    (height, width), ranks = asked.request.size, min(room.sharing, asked.ranks)
    weights = asked.itemsize * (numbers + asked.model.text.numbers) + asked.itemsize * asked.lora_numbers
    pictures = asked.request.num_images * height * width * MOST_PER_PIXEL
    return ranks * (weights + MOST_BESIDES) + pictures <= room.bytes


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
    kind = named_like(found.name) or unknown(found.name, found.total)
    return replace(kind, float8=found.capability >= FLOAT8_CAPABILITY)


def _shown(plan: Plan) -> str:
    together = f"{plan.room.sharing} ranks" if plan.room.sharing > 1 else f"rank {plan.largest.rank}"
    needed, free = (f"{amount / 1e9:.1f} GB" for amount in (plan.needed, plan.room.bytes))
    return f"{together} must fit in the {free} that are free on {plan.room.where}, got {needed}"
