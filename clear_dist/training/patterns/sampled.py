"""Key-value sampling (Sec. 2.3): softmax attention under a mask; text queries see everything, and all see text keys.

Shapes: B batch, N heads, L tokens, D head dim, T text tokens, I image tokens.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from clear_dist.training.attention import Layout

MASKS_KEPT = 16
"""As many masks as layers have that differ: the offsets of a stride of 4."""
Places = tuple[Tensor, Tensor]
"""Rows and columns of image tokens."""


class Sampled(ABC):
    """A pattern whose image queries see some image keys as they are. It is hashable, for its masks are kept."""

    @abstractmethod
    def sees(self, query: Places, key: Places, layer: int) -> Tensor:
        """Whether image queries see image keys, bool; places broadcast."""

    def parameters(self, layout: Layout, heads: int, head_dim: int) -> Mapping[str, Tensor]:
        return {}

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, layout: Layout, parameters: Mapping[str, Tensor]
    ) -> Tensor:
        (text, image), (text_key, image_key), (text_value, image_value) = map(layout.split, (query, key, value))
        seen_II = image_mask(self, layout.height, layout.width, layout.layer, query.device)
        out_image = scaled_dot_product_attention(
            image,
            torch.cat([text_key, image_key], dim=2),
            torch.cat([text_value, image_value], dim=2),
            attn_mask=pad(seen_II, (text.shape[2], 0), value=True),
        )
        return layout.join(scaled_dot_product_attention(text, key, value) if text.shape[2] else text, out_image)

    def operations(self, layout: Layout, text: int, heads: int, head_dim: int) -> int:
        seen = int(image_mask(self, layout.height, layout.width, layout.layer, torch.device("cpu")).sum())
        return 4 * heads * head_dim * (text * (text + 2 * layout.image) + seen)


@lru_cache(maxsize=MASKS_KEPT)
def image_mask(pattern: Sampled, height: int, width: int, layer: int, device: torch.device) -> Tensor:
    """Whether an image query sees an image key, bool [I, I]."""
    place = torch.arange(height * width, device=device)
    row, column = place // width, place % width
    return pattern.sees((row[:, None], column[:, None]), (row, column), layer)
