"""HiFlow (arXiv 2504.06232): a flow aligned to that of the stage below, which keeps the clean latents of each step.

Both the clean latents (their low frequencies) and the change of velocity from step to step follow those of the stage
below at the same level of noise, less and less so.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from clear_dist.refining.low_pass import low_pass
from clear_dist.refining.way import LEAST_SIGMA, Guide, Step

if TYPE_CHECKING:
    from torch import Tensor

PICTURE = (1.0, 0.25)
"""alpha: how much the clean latents follow, in the first refinement and in later ones."""
ACCELERATION = 0.5
"""beta: how much the change of velocity follows."""
STEPS, LATER_STEPS, BASE_STEPS = 16, 10, 30
"""Steps of the paper at 2048, 4096 and 1024 px."""


class HiFlow:
    guides, keeps = True, True
    copies = shifts = False

    def usual(self, steps: int, strength: float) -> Mapping[str, Any]:
        """16 and then 10 steps for 30."""
        first, later = (max(1, round(steps * share / BASE_STEPS)) for share in (STEPS, LATER_STEPS))
        return {"steps": first, "later_steps": later, "strength": 1.0, "guidance_scale": 4.5}

    def check(self, steps: int) -> None:
        """Any number of steps will do, up to the stage below's."""

    def schedule(
        self, steps: int, strength: float, shift: float, below: Sequence[float]
    ) -> tuple[Sequence[float], float]:
        """The last levels of the stage below, as they are."""
        assert len(below) >= steps, f"{len(below)} levels kept for {steps} steps"
        return below[-steps:], 1.0

    def velocity(self, velocity: "Tensor", step: Step, guide: Guide, before: Any) -> "tuple[Tensor, Any]":
        assert guide.expected is not None, "kept by the stage below"
        fading, divisor = 1 - step.index / step.count, step.sigma + LEAST_SIGMA
        clean = step.latents - step.sigma * velocity
        clean = clean + PICTURE[min(guide.level, 2) - 1] * fading * low_pass(guide.expected - clean)
        aligned, followed = (step.latents - clean) / divisor, (step.latents - guide.expected) / divisor
        if before is not None:
            change = before[0] + followed - before[1] - aligned
            aligned = aligned + ACCELERATION * fading * change
        return aligned, (aligned, followed)
