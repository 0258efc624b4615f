"""Strided attention (Eq. 15): image queries see one key in each square, at an offset that changes with the layer."""

from dataclasses import dataclass

from torch import Tensor

from clear_dist.training.patterns.sampled import Places, Sampled


@dataclass(frozen=True, kw_only=True)
class Strided(Sampled):
    """Keys whose distance, query minus key, has on each axis the layer's remainder modulo `stride`.

    Eq. 15's r_y = l // r is no remainder from layer r^2 on, where no image would be seen: it is taken modulo r, too, so
    that offsets come again after r^2 layers.
    """

    stride: int

    def sees(self, query: Places, key: Places, layer: int) -> Tensor:
        down, across = query[0] - key[0], query[1] - key[1]
        down_left, across_left = layer // self.stride % self.stride, layer % self.stride
        return (down % self.stride == down_left) & (across % self.stride == across_left)
