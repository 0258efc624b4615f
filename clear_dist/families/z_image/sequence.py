"""Z-Image's sequence on stripes: positions in the whole image, the image's padding, and text first.

Shapes: B batch, L tokens of this rank, P padding of the image, T caption, C channels, F complex numbers of a position.
"""

from typing import Any

import torch
from diffusers.models.transformers.transformer_z_image import SEQ_MULTI_OF, ZImageTransformer2DModel
from torch import Tensor

from clear_dist.engine.extrapolation import Extrapolation
from clear_dist.engine.family import Stripes
from clear_dist.engine.rotary import frequencies


def padding(height: int, width: int) -> int:
    """Tokens that fill an image up to a multiple of 32."""
    return -(height * width) % SEQ_MULTI_OF


class Sequencing:
    """Three methods of one transformer, until `remove`: what they are given is one rank's rows."""

    def __init__(self, model: Any, striped: Stripes) -> None:
        self._model = model
        self._striped = striped
        self._methods = {
            "patchify_and_embed": self._patchify,
            "_build_unified_sequence": self._unify,
            "unpatchify": self._unpatchify,
        }
        vars(model).update(self._methods)

    def remove(self) -> None:
        for name in self._methods:
            vars(self._model).pop(name, None)

    @property
    def _padding(self) -> int:
        cut = self._striped.running_cut
        return padding(cut.height, cut.width)

    def _patchify(self, images: list[Tensor], captions: list[Tensor], *sizes: int) -> tuple[Any, ...]:
        """As the stock method, but that images are padded as the whole one is, and padding stands before the image."""
        found = ZImageTransformer2DModel.patchify_and_embed(self._model, images, captions, *sizes)
        patches, texts, size, image_ids, text_ids, masks, text_masks = found
        cut, pads = self._striped.running_cut, self._padding
        own = len(cut.plan.own) * cut.width
        for index, (tokens, ids, mask) in enumerate(zip(patches, image_ids, masks, strict=True)):
            mine = ids[:own].clone()
            mine[:, 1] += cut.plan.own.start
            mine = mine[:, [0, 2, 1]] if cut.by_columns else mine
            patches[index] = torch.cat([tokens[:1].expand(pads, -1), tokens[:own]])
            image_ids[index] = torch.cat([mine.new_zeros(pads, 3), mine])
            masks[index] = torch.cat([mask.new_ones(pads), mask.new_zeros(own)])
        return patches, texts, size, image_ids, text_ids, masks, text_masks

    def _unify(
        self,
        image: Tensor,
        image_turns: Tensor,
        image_lengths: list[int],
        _image_noise: None,
        caption: Tensor,
        caption_turns: Tensor,
        *_: Any,
    ) -> tuple[Tensor, Tensor, None, None]:
        """My share of the text [P, T], then my rows, and their turns; padded captions are the engine's to mask."""
        return self._joined(image, caption), self._joined(image_turns, caption_turns), None, None

    def _joined(self, image_BLC: Tensor, caption_BTC: Tensor) -> Tensor:
        pads = self._padding
        text = torch.cat([image_BLC[:, :pads], caption_BTC], dim=1)[:, self._striped.text_plan.own]
        return torch.cat([text, image_BLC[:, pads:]], dim=1)

    def _unpatchify(self, tokens: list[Tensor], *how: Any) -> list[Tensor]:
        cut = self._striped.running_cut
        own = len(cut.plan.own) * cut.width
        return ZImageTransformer2DModel.unpatchify(self._model, [x[len(x) - own :] for x in tokens], *how)


NOT_BEYOND = Extrapolation(native_tokens=2)
"""For the axis along the caption, which stays as it is."""


class ScaledRope:
    """Z-Image's rotary embedding above the native size: another base, and scaled positions, of rows and columns."""

    def __init__(self, stock: Any, extrapolation: Extrapolation) -> None:
        self.axes_dims = stock.axes_dims
        self.axes_lens = stock.axes_lens
        self.theta = stock.theta
        self._extrapolation = extrapolation

    def __call__(self, ids: Tensor) -> Tensor:
        """Complex turns [L, F] of positions [L, 3]."""
        turns = []
        for axis, channels in enumerate(self.axes_dims):
            beyond = self._extrapolation if axis else NOT_BEYOND
            turns_per_position = frequencies(channels, self.theta, beyond, ids.device)
            angles = torch.outer(ids[:, axis] * beyond.position_scale, turns_per_position).float()
            turns.append(torch.polar(torch.ones_like(angles), angles))
        return torch.cat(turns, dim=-1)
