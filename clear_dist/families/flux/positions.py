"""Where a rank's tokens are, and FLUX's rotary embedding of that: computed once a generation where tokens are few.

Shapes: L tokens of this rank, text first; D head dim.
"""

import torch
from diffusers.models.transformers.transformer_flux import FluxPosEmbed
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from clear_dist.engine.cut import Cut
from clear_dist.engine.extrapolation import Extrapolation
from clear_dist.engine.fused import is_stock
from clear_dist.engine.references import after_references, flat_ids, own_ids
from clear_dist.engine.rotary import cosines_and_sines
from clear_dist.families.flux.attention import Rotary

MOST_REMEMBERED = 8_192
"""Image tokens of a rank whose embedding, 1 KB each, is kept from step to step; with more, launches do not rule."""


class StripedPosEmbed(FluxPosEmbed):
    def forward(self, ids: Tensor) -> Rotary:
        """Cosines and sines [L, D] for ids [L, 3], or from rows [L, 2 x D] that hold them already."""
        if ids.shape[-1] == len(self.axes_dim):
            return FluxPosEmbed.forward(self, ids)
        cos_LD, sin_LD = ids.chunk(2, dim=-1)
        return cos_LD, sin_LD


class ClippedPosEmbed(StripedPosEmbed):
    """Above the native size, with a bound for low frequencies."""

    def __init__(self, stock: FluxPosEmbed, beyond: Extrapolation) -> None:
        super().__init__(theta=stock.theta, axes_dim=stock.axes_dim)
        self._beyond = beyond

    def forward(self, ids: Tensor) -> Rotary:
        if ids.shape[-1] != len(self.axes_dim):
            return super().forward(ids)
        return cosines_and_sines(ids, self.axes_dim, self.theta, self._beyond)


class Positions:
    """A transformer's ids, cut to this rank; or their embedding, kept as long as the text's ids: for a generation."""

    def __init__(self) -> None:
        self._known = WeakTensorKeyDictionary()

    def __call__(
        self, embed: nn.Module, text_ids: Tensor, text: slice, cut: Cut, references: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Rows for my text tokens, and for my reference and image tokens; `embed`, the transformer's own, turns them
        into cosines and sines."""
        few = len(cut.plan.own) * cut.width <= MOST_REMEMBERED and not len(references)
        if not few or not is_stock(embed, StripedPosEmbed, ClippedPosEmbed):
            return all_ids(text_ids, text, cut, references)
        version = None if text_ids.is_inference() else text_ids._version  # others do not tell that they were changed
        made_for = cut.size, cut.by_columns, cut.plan.own, cut.extrapolation, text, version
        known_for, rows = self._known.get(text_ids, (None, None))
        if known_for != made_for:
            with torch.inference_mode(False):  # a later forward may be outside of it
                ids = all_ids(text_ids, text, cut, references)
                rows = torch.cat(embed(torch.cat(ids)), dim=-1).split([len(each) for each in ids])
            self._known[text_ids] = made_for, rows
        return rows


def all_ids(text_ids: Tensor, text: slice, cut: Cut, references: Tensor) -> tuple[Tensor, Tensor]:
    """Ids [tokens, 3] of my text tokens, and of my reference and image tokens."""
    ids = own_ids(cut, text_ids.device)
    return flat_ids(text_ids)[text].float(), after_references(references.float(), ids, 0)
