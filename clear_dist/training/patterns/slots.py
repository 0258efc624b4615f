"""Slot attention (Eq. 13 and 14): learned slots gather the image's keys and values."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from clear_dist.training.attention import Layout
from clear_dist.training.patterns.compressed import Compressed


@dataclass(frozen=True, kw_only=True)
class Slots(Compressed):
    """`slots` rows of P, whose channels are in heads like those of the keys.

    Eq. 13 compares P with the layer's input X, which no attention gets to see: here it is compared with the keys, as if
    P were learned through their projection.
    """

    slots: int

    def parameters(self, layout: Layout, heads: int, head_dim: int) -> Mapping[str, Tensor]:
        apart = torch.Generator().manual_seed(layout.layer)
        return {"slots": torch.randn(heads, self.slots, head_dim, generator=apart)}

    def compress(
        self, query: Tensor, key: Tensor, value: Tensor, layout: Layout, parameters: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        slots_BNCD = parameters["slots"].to(key.dtype).expand(len(key), -1, -1, -1)
        return scaled_dot_product_attention(slots_BNCD, key, key), scaled_dot_product_attention(slots_BNCD, key, value)

    def compressed(self, layout: Layout) -> int:
        return self.slots

    def operations(self, layout: Layout, text: int, heads: int, head_dim: int) -> int:
        """Scores of the slots count once, their sums for keys and for values."""
        gathering = 6 * heads * head_dim * self.slots * layout.image
        return super().operations(layout, text, heads, head_dim) + gathering
