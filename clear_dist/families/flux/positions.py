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
from clear_dist.families.flux import yarn
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


class YarnPosEmbed(StripedPosEmbed):
    """UltraFlux's, for rows only: they depend on the size of the whole picture."""

    def rows(self, ids: Tensor, size: tuple[int, int]) -> Tensor:
        """Cosines, then sines [L, 2 x D], for ids [L, 3] of a picture of `size` tokens, or of its text."""
        return torch.cat(yarn.cosines_and_sines(ids, self.axes_dim, self.theta, size), dim=-1)


class Positions:
    """A transformer's ids, cut to this rank; or their embedding, kept as long as the text's ids: for a generation."""

    def __init__(self) -> None:
        self._known = WeakTensorKeyDictionary()

    def __call__(
        self, embed: nn.Module, text_ids: Tensor, text: slice, cut: Cut, references: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Rows for my text tokens, and for my reference and image tokens; `embed`, the transformer's own, turns them
        into cosines and sines."""
        few, has_yarn = len(cut.plan.own) * cut.width <= MOST_REMEMBERED and not len(references), needs_size(embed)
        if not (few and (has_yarn or is_stock(embed, StripedPosEmbed, ClippedPosEmbed))):
            ids = all_ids(text_ids, text, cut, references)
            return embedded(embed, ids, cut) if has_yarn else ids
        version = None if text_ids.is_inference() else text_ids._version  # others do not tell that they were changed
        made_for = cut.size, cut.by_columns, cut.plan.own, cut.extrapolation, text, version
        known_for, rows = self._known.get(text_ids, (None, None))
        if known_for != made_for:
            with torch.inference_mode(False):  # a later forward may be outside of it
                rows = embedded(embed, all_ids(text_ids, text, cut, references), cut)
            self._known[text_ids] = made_for, rows
        return rows


def needs_size(embed: nn.Module) -> bool:
    """Whether it embeds by the whole picture's size; raises ValueError where others' hooks would see rows for ids."""
    if isinstance(embed, YarnPosEmbed) and not is_stock(embed, YarnPosEmbed):
        raise ValueError("YaRN's positions are made for the whole picture: leave out hooks on the rotary embedding")
    return isinstance(embed, YarnPosEmbed)


def embedded(embed: nn.Module, ids: tuple[Tensor, Tensor], cut: Cut) -> tuple[Tensor, Tensor]:
    """Rows for ids of text and image."""
    joined = torch.cat(ids)
    rows = embed.rows(joined, cut.size) if isinstance(embed, YarnPosEmbed) else torch.cat(embed(joined), dim=-1)
    text, image = rows.split([len(each) for each in ids])
    return text, image


def all_ids(text_ids: Tensor, text: slice, cut: Cut, references: Tensor) -> tuple[Tensor, Tensor]:
    """Ids [tokens, 3] of my text tokens, and of my reference and image tokens."""
    ids = own_ids(cut, text_ids.device)
    return flat_ids(text_ids)[text].float(), after_references(references.float(), ids, 0)
