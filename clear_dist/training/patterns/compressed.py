"""Key-value compression (Sec. 2.2): image queries see all text keys, and a few keys that stand for the image's.

Text queries see everything as it is: so Table 2 counts.

Shapes: B batch, N heads, L tokens, D head dim, I image tokens, C compressed ones, H rows and W columns.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from clear_dist.training.attention import Layout


class Compressed(ABC):
    @abstractmethod
    def compress(
        self, query: Tensor, key: Tensor, value: Tensor, layout: Layout, parameters: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Keys and values [B, N, C, D] that stand for the image, from its queries, keys and values [B, N, I, D]."""

    @abstractmethod
    def compressed(self, layout: Layout) -> int:
        """C, the number of these tokens."""

    def parameters(self, layout: Layout, heads: int, head_dim: int) -> Mapping[str, Tensor]:
        return {}

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, layout: Layout, parameters: Mapping[str, Tensor]
    ) -> Tensor:
        (text, image), (text_key, image_key), (text_value, image_value) = map(layout.split, (query, key, value))
        few_keys, few_values = self.compress(image, image_key, image_value, layout, parameters)
        out_image = scaled_dot_product_attention(
            image, torch.cat([text_key, few_keys], dim=2), torch.cat([text_value, few_values], dim=2)
        )
        return layout.join(scaled_dot_product_attention(text, key, value) if text.shape[2] else text, out_image)

    def operations(self, layout: Layout, text: int, heads: int, head_dim: int) -> int:
        of_image = layout.image * (text + self.compressed(layout))
        return 4 * heads * head_dim * (text * (text + layout.image) + of_image)


def as_picture(x_BNID: Tensor, layout: Layout) -> Tensor:
    """Image tokens with the channels of all heads, [B, N * D, H, W]."""
    return x_BNID.transpose(2, 3).flatten(1, 2).unflatten(2, (layout.height, layout.width))


def as_tokens(picture: Tensor, heads: int) -> Tensor:
    """Tokens [B, N, I, D] of a picture [B, N * D, H, W]."""
    return picture.flatten(2).unflatten(1, (heads, -1)).transpose(2, 3)
