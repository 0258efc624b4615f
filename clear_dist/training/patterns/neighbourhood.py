"""Neighbourhood attention (Sec. 2.3): image queries see a square around them, cut off at the picture's border.

NATTEN moves the square inwards there instead; CLEAR's circle is cut off, and this is the square around it.
"""

from dataclasses import dataclass

from torch import Tensor

from clear_dist.training.patterns.sampled import Places, Sampled


@dataclass(frozen=True, kw_only=True)
class Neighbourhood(Sampled):
    """Keys less than `radius` rows and less than `radius` columns away."""

    radius: int

    def sees(self, query: Places, key: Places, layer: int) -> Tensor:
        down, across = query[0] - key[0], query[1] - key[1]
        return (down.abs() < self.radius) & (across.abs() < self.radius)
