"""The part of a user's picture that stays, in pixels: rows of it and of its mask, at a stage's size.

Shapes: B pictures, R my rows, W columns, both in pixels.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from clear_dist.request.pictures import LEAST_WHITE


@dataclass(frozen=True, kw_only=True)
class Stencil:
    """Bytes: where the mask is 255 a picture is drawn, where it is 0 the user's own stays, between they are mixed."""

    own: Tensor
    """[1, 3, R, W]."""
    mask: Tensor
    """[1, 1, R, W]."""

    def pasted(self, drawn_BCRW: Tensor) -> Tensor:
        """Bytes of the picture drawn, with the user's own where it stays."""
        mask = self.mask.int()
        mixed = drawn_BCRW.int().mul_(mask).add_(self.own.int().mul_(255 - mask))
        return mixed.add_(127).div_(255, rounding_mode="floor").to(torch.uint8)

    def at_latents(self, scale: int) -> Tensor:
        """Whether each latent, `scale` pixels high and wide, is drawn anew, [1, 1, R / scale, W / scale]."""
        return self.mask[:, :, ::scale, ::scale] >= LEAST_WHITE
