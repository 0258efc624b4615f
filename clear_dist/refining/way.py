"""What a way of refining answers: where a stage starts, its levels of noise, and what each step's velocity becomes.

Velocities are those of flow matching, x = (1 - sigma) x0 + sigma noise, v = noise - x0. All latents are as the VAE has
them, whole pictures that are equal on all ranks. Shapes: B pictures, C channels, H rows and W columns of latents.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor


LEAST_SIGMA = 1e-6
"""Added to a level of noise that is divided by, as in the official codes."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """A step of a stage, about to be taken."""

    index: int
    """From 0."""
    count: int
    """Steps of the stage."""
    sigma: "Tensor"
    """Level of noise, a single number."""
    latents: "Tensor"
    """Noisy latents [B, C, H, W]."""


@dataclass(frozen=True, kw_only=True)
class Guide:
    """What a stage knows of the one below."""

    target: "Tensor"
    """Its picture, enlarged and encoded, [B or 1, C, H, W]."""
    expected: "Tensor | None" = None
    """The clean latents that it expected at this step's level of noise, enlarged, [B, C, H, W]; where `keeps`."""
    level: int = 1
    """Stages below that are refinements, and this one."""


class Refinement(Protocol):
    """A way of refining. Noise is added to the enlarged picture up to the first level: at 1 nothing of it is left."""

    guides: bool
    """Whether `velocity` changes anything."""
    keeps: bool
    """Whether each stage keeps the clean latents that its last steps expect, for the next one's steps."""
    copies: bool
    """Whether each block of tokens of the native size has a copy of the text, with ids that begin at the block's."""
    shifts: bool
    """Whether even steps have their patches half a token off, with a ring of zeros one latent wide around."""

    def usual(self, steps: int, strength: float) -> Mapping[str, Any]:
        """Settings of `Upscaling` above a stage of `steps` steps; `strength` is the model's usual one."""

    def check(self, steps: int) -> None:
        """Raises ValueError where a stage cannot have so many steps."""

    def schedule(
        self, steps: int, strength: float, shift: float, below: Sequence[float]
    ) -> tuple[Sequence[float], float]:
        """Levels of noise before the shift, and the shift: sigma -> shift sigma / (1 + (shift - 1) sigma).

        `shift` is the scheduler's static one, `below` the levels, shifted, of the steps that the stage below kept.
        """

    def velocity(self, velocity: "Tensor", step: Step, guide: Guide, before: Any) -> "tuple[Tensor, Any]":
        """The velocity to go by instead of the model's, and what the next step gets as `before`; None at first."""


def falling(strength: float, steps: int) -> list[float]:
    """Levels of noise from `strength` down in equal steps, of which the last one ends at 0."""
    return np.linspace(strength, strength / steps, steps).tolist()
