"""Low frequencies of latents, by the first level of Haar's wavelet: within a token, so that no rank asks another."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def low_pass(latents: "Tensor") -> "Tensor":
    """Latents [..., H, W], both even, of which each 2 x 2 have their mean."""
    cells = latents.unflatten(-1, (-1, 2)).unflatten(-3, (-1, 2))
    return cells.mean(dim=(-3, -1), keepdim=True).expand_as(cells).flatten(-4, -3).flatten(-2)
