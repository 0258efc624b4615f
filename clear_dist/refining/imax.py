"""I-Max (arXiv 2410.07536): fresh noise, its velocity led by the low frequencies of the enlarged picture.

Every other step has its patches half a token off, so that no seam between patches stays where it is. Each block of
tokens of the native size has a copy of the text, as near to it as the text was in training.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import cos, pi
from typing import TYPE_CHECKING, Any, Literal

from clear_dist.refining.low_pass import low_pass
from clear_dist.refining.way import LEAST_SIGMA, Guide, Step, falling

if TYPE_CHECKING:
    from torch import Tensor

SHIFT_FACTOR = 2.0
"""The scheduler's static shift is multiplied by it: 6 in place of 3 in the paper."""


@dataclass(frozen=True)
class IMax:
    led_by: Literal["cosine_decay", "cosine_shift", "constant"] = "cosine_decay"
    """How guidance goes on from step to step, in the official code's words."""

    guides, keeps = True, False
    copies = shifts = True

    def usual(self, steps: int, strength: float) -> Mapping[str, Any]:
        """As many steps as the stage below, or one more: 30 and 30 in the paper."""
        return {"steps": steps + steps % 2, "strength": 1.0, "guidance_scale": 7.0}

    def check(self, steps: int) -> None:
        """Raises ValueError for an odd number: each step off the grid is followed by one on it."""
        if steps % 2:
            raise ValueError(f"imax takes an even number of steps, got {steps}; nearest: {steps + 1}")

    def schedule(
        self, steps: int, strength: float, shift: float, below: Sequence[float]
    ) -> tuple[Sequence[float], float]:
        return falling(1.0, steps), SHIFT_FACTOR * shift

    def velocity(self, velocity: "Tensor", step: Step, guide: Guide, before: Any) -> "tuple[Tensor, Any]":
        towards = (step.latents - guide.target) / (step.sigma + LEAST_SIGMA)
        difference = towards - velocity
        share = (1 + cos(pi * step.index / step.count)) / 2
        if self.led_by == "constant":
            return velocity + low_pass(difference), None
        if self.led_by == "cosine_decay":
            return velocity + share * low_pass(difference), None
        return velocity + share * difference + (1 - share) * low_pass(difference), None
