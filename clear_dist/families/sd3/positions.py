"""SD3's absolute positions, for a rank's rows of the whole image.

The model has a table of M x M positions. An image of H x W tokens takes the middle of it: row i has the table's row
(M - H) // 2 + i, likewise columns. A larger one is spread over the table, both axes by s = min(1, M / max(H, W)), also
where positions are to be interpolated above the native size, by that scale if it is smaller:

    t_i = (M - 1) / 2 + s (i - (H - 1) / 2)            row i in rows of the table, its middle in the table's middle
    p_i = t_i b / (M k)                                b: the native side in tokens, k: the model's own scale, 1
    e(p) = [sin(p w_0), ..., cos(p w_0), ...]          w_j = 10000^(-j / (C / 4)), C / 4 of each
    position of row i, column j = [e(p of column j), e(p of row i)]

of which the table's own values are those for whole t. Shapes: C channels, L tokens of this rank.
"""

from typing import Any

import torch
from diffusers.models.embeddings import get_1d_sincos_pos_embed_from_grid
from torch import Tensor

from clear_dist.engine.cut import Cut
from clear_dist.engine.family import Stripes

CROP = "cropped_pos_embed"


class StripePositions:
    """A PatchEmbed's positions of the running cut's rows, until `remove`; an attribute of this one instance."""

    def __init__(self, patches: Any, striped: Stripes) -> None:
        self._patches = patches
        self._striped = striped
        vars(patches)[CROP] = self._of_stripe

    def remove(self) -> None:
        vars(self._patches).pop(CROP, None)

    def _of_stripe(self, height: int, width: int) -> Tensor:
        """Positions [1, L, C], whatever the sides of the latents, which are a stripe's."""
        return positions(self._patches, self._striped.running_cut)[None]


def positions(patches: Any, cut: Cut) -> Tensor:
    """Positions of a cut's rows, [L, C]."""
    side, (height, width) = patches.pos_embed_max_size, cut.size
    own, every = cut.plan.own.relative_to(0), slice(None)
    rows, columns = (every, own) if cut.by_columns else (own, every)
    scale = min(1.0, side / max(height, width))
    if cut.extrapolation is not None:
        scale = min(scale, cut.extrapolation.position_scale)
    if scale == 1:
        top, left = (side - height) // 2, (side - width) // 2
        table = patches.pos_embed.unflatten(1, (side, side))[0]
        return in_stripe(table[top : top + height, left : left + width][rows, columns], cut)
    table, encoded = patches.pos_embed, []
    for length, mine in ((width, columns), (height, rows)):
        middle = torch.arange(length, device=table.device, dtype=torch.float64) - (length - 1) / 2
        at = ((side - 1) / 2 + scale * middle[mine]) * patches.base_size / (side * patches.interpolation_scale)
        encoded.append(get_1d_sincos_pos_embed_from_grid(table.shape[2] // 2, at).to(table.dtype))
    across, down = encoded
    shape = len(down), len(across), -1
    return in_stripe(torch.cat([across.expand(shape), down[:, None].expand(shape)], dim=2), cut)


def in_stripe(positions_HWC: Tensor, cut: Cut) -> Tensor:
    """Positions of the image's rows and columns that are mine, in the order of the stripe."""
    return (positions_HWC.transpose(0, 1) if cut.by_columns else positions_HWC).flatten(0, 1)
