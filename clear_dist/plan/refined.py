"""What ways of refining take besides a step: clean latents that a stage keeps for the next one's steps, in stripes."""

from math import prod

from clear_dist.plan.asked import PlanRequest
from clear_dist.stages import Stage, Upscaling

FLOAT32 = 4


def below(asked: PlanRequest, stage: Stage) -> Stage | None:
    """The stage whose clean latents the steps of this one go by; None: they go by none."""
    number, upper = asked.stages.index(stage), stage.sampling
    return asked.stages[number - 1] if number and isinstance(upper, Upscaling) and upper.way.keeps else None


def clean_bytes(asked: PlanRequest, stage: Stage, ranks: int) -> int:
    """Bytes of a step's clean latents of a stage on each of so many ranks; 1: of whole pictures."""
    cells = asked.model.packing**2
    positions = cells * prod(stage.size) // asked.model.token**2
    return FLOAT32 * asked.request.images_at_once * -(-positions // ranks) * (asked.model.channels // cells)


def held_bytes(asked: PlanRequest, number: int, ranks: int) -> int:
    """Bytes that each of so many ranks keeps of stage `number` for the next one."""
    above = asked.stages[number + 1] if number + 1 < len(asked.stages) else None
    if above is None or below(asked, above) is None:
        return 0
    return above.sampling.steps * clean_bytes(asked, asked.stages[number], ranks)
