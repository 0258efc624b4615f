"""Swin Transformer's windows (Eq. 16): image queries see the window that they lie in, shifted in every other layer."""

from dataclasses import dataclass

from torch import Tensor

from clear_dist.training.patterns.sampled import Places, Sampled


@dataclass(frozen=True, kw_only=True)
class Swin(Sampled):
    """Windows of `side` x `side` tokens, shifted by half of that, down and across, in layers of odd numbers.

    The picture's border cuts windows off, in shifted layers (as Swin's masked cyclic shift does) and where the grid is
    no multiple of `side`.
    """

    side: int

    def sees(self, query: Places, key: Places, layer: int) -> Tensor:
        shift = layer % 2 * (self.side // 2)
        (row, column), (key_row, key_column) = ([(x + shift) // self.side for x in places] for places in (query, key))
        return (row == key_row) & (column == key_column)
