"""Fewer ranks for a stage that a plan says they draw sooner: messages or the host may take longer than computing.

A pure function of the request and the kind of GPU: the memory that happens to be free does not change the picture.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from clear_dist.plan.fits import ERROR, Plan, halves
from clear_dist.plan.phases import Memory
from clear_dist.plan.timing import StageTime, stage_time
from clear_dist.request.request import Request
from clear_dist.stages import Size

GAIN = 0.05
"""Share of a stage's time that fewer ranks must save: an estimate is not better than that."""
LEAST_SAVED = 0.5
"""Seconds that they must save, too: what nobody feels is not worth another picture."""


@dataclass(frozen=True, kw_only=True)
class Fewer:
    """Ranks of a stage, and seconds of the plan on them and on as many as there could be."""

    size: Size
    ranks: int
    most: int
    seconds: float
    on_most: float

    def words(self, *, averages: bool) -> str:
        """Why, for people; `averages`: whether the picture depends on the number of ranks (Eq. 7 of the paper)."""
        height, width = self.size
        other = "; text is averaged, so they draw another picture: --stage-ranks all" if averages else ""
        return (
            f"{width}x{height} is drawn by {self.ranks} of {self.most} ranks, in {self.seconds:.2g} s by the plan "
            f"where all take {self.on_most:.2g}{other}"
        )


def may_use_fewer(request: Request) -> bool:
    """Whether fewer may be chosen at all.

    Sharded weights need all ranks, stale buffers were found room for on all, and all write a profile.
    """
    is_fixed = request.shard_weights or request.schedule == "stale" or request.profile is not None
    return request.device == "cuda" and request.ranks > 1 and request.stage_ranks == "auto" and not is_fixed


def fewer_ranks(plan: Plan) -> tuple[Fewer, ...]:
    """Stages on fewer ranks than could draw them; none without known rates, or where ranks share GPUs.

    Raises a Refusal where the model cannot be built.
    """
    asked = plan.asked
    if not may_use_fewer(asked.request) or asked.shares_gpus:
        return ()
    found = (_of_stage(plan, number) for number in range(len(asked.stages)))
    return tuple(fewer for fewer in found if fewer is not None)


@dataclass(frozen=True, kw_only=True)
class Halves:
    """Seconds of the plan where each half of the ranks takes a pass of guidance, and where all take both."""

    ranks: int
    seconds: float
    otherwise: float

    def words(self, *, averages: bool) -> str:
        """Why, for people; `averages` as in `Fewer`."""
        other = "; text is averaged, so they draw another picture: --guidance-ranks 1" if averages else ""
        return (
            f"each half of {self.ranks} ranks takes a pass of guidance, in {self.seconds:.2g} s by the plan where all "
            f"take {self.otherwise:.2g} for both{other}"
        )


def may_have_halves(request: Request) -> bool:
    """Whether halves for guidance may be chosen at all."""
    is_open = request.guidance_ranks == "auto" and request.device == "cuda"
    return is_open and request.is_guided and request.ranks % 2 == 0


def halves_of(plan: Plan) -> Halves | None:
    """Halves for guidance where the plan says that they are sooner, and fit; None where it does not, or cannot.

    Raises a Refusal where the model cannot be built.
    """
    if not may_have_halves(plan.asked.request):
        return None
    halved = _in_halves(plan)
    seconds, otherwise = halved.seconds, plan.seconds
    if seconds is None or otherwise is None or seconds > (1 - GAIN) * otherwise or not halved.fits:
        return None
    return Halves(ranks=plan.asked.ranks, seconds=seconds, otherwise=otherwise)


def _in_halves(plan: Plan) -> Plan:
    return replace(plan, asked=plan.asked.changed(guidance_ranks=2))


def chosen(plan: Plan) -> Plan:
    """The plan with halves where they are chosen, and the ranks that its stages are drawn by."""
    settled = plan if halves_of(plan) is None else _in_halves(plan)
    return replace(settled, asked=replace(settled.asked, stage_ranks=by_size(fewer_ranks(settled))))


def by_size(found: tuple[Fewer, ...]) -> Mapping[Size, int]:
    return {fewer.size: fewer.ranks for fewer in found}


def _of_stage(plan: Plan, number: int) -> Fewer | None:
    size, most = plan.asked.stages[number].size, len(plan.asked.parts[number])
    on_most = _time(plan, number, most)
    # On fewer ranks computing takes no less: then there is nothing to be gained, nor to ask the engine.
    if on_most is None or on_most.computing >= (1 - GAIN) * on_most.step:
        return None
    times = {ranks: time.total for ranks in halves(most) if (time := _time(plan, number, ranks)) is not None}
    for ranks in sorted(times, key=lambda each: (times[each], -each)):
        if times[ranks] > min((1 - GAIN) * on_most.total, on_most.total - LEAST_SAVED):
            return None
        if _fits(plan, number, ranks):
            return Fewer(size=size, ranks=ranks, most=most, seconds=times[ranks], on_most=on_most.total)
    return None


def _on(plan: Plan, number: int, ranks: int) -> Plan:
    return replace(plan, asked=replace(plan.asked, stage_ranks={plan.asked.stages[number].size: ranks}))


def _time(plan: Plan, number: int, ranks: int) -> StageTime | None:
    return stage_time(plan.engine, _on(plan, number, ranks).asked, number)


def _fits(plan: Plan, number: int, ranks: int) -> bool:
    """Whether a stage on so many ranks fits, were the plan as far below as it may be."""
    asked = _on(plan, number, ranks).asked
    memory = Memory(asked=asked, engine=plan.engine)
    largest = max(asked.parts[number], key=lambda part: (part.rows, part.received, part.sent))
    phases = (phase for rank in {0, largest.rank} for phase in memory.of_stage(rank, number))
    return max(phase.total for phase in phases) * (1 + ERROR) <= plan.room.bytes
