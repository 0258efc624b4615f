"""SDEdit (arXiv 2108.01073), as in CLEAR's notebook (paper, Sec. 4.3): a picture gets noise, and loses it."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from clear_dist.refining.way import Guide, Step, falling

if TYPE_CHECKING:
    from torch import Tensor


class SDEdit:
    guides = keeps = copies = shifts = False

    def usual(self, steps: int, strength: float) -> Mapping[str, Any]:
        """As many steps as diffusers' image-to-image takes of `steps`, at least one."""
        return {"steps": max(1, round(steps * strength))}

    def check(self, steps: int) -> None:
        """Any number of steps will do."""

    def schedule(
        self, steps: int, strength: float, shift: float, below: Sequence[float]
    ) -> tuple[Sequence[float], float]:
        return falling(strength, steps), shift

    def velocity(self, velocity: "Tensor", step: Step, guide: Guide, before: Any) -> "tuple[Tensor, Any]":
        return velocity, None
