"""Linear attention, generalised and normalised (Eq. 8): products of non-negative features instead of the softmax.

Shapes: B batch, N heads, L tokens, D head dim.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import elu

from clear_dist.training.attention import Layout


@dataclass(frozen=True)
class Linear:
    """Features of queries and keys are elu(x) + 1; text is treated as the image is: so Table 2 counts."""

    def parameters(self, layout: Layout, heads: int, head_dim: int) -> Mapping[str, Tensor]:
        return {}

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, layout: Layout, parameters: Mapping[str, Tensor]
    ) -> Tensor:
        query, key = elu(query.float()) + 1, elu(key.float()) + 1
        out_BNLD = query @ (key.transpose(2, 3) @ value.float())
        total_BNL1 = query @ key.sum(dim=2).unsqueeze(-1)
        return (out_BNLD / total_BNL1.clamp(min=torch.finfo(torch.float32).tiny)).to(value.dtype)

    def operations(self, layout: Layout, text: int, heads: int, head_dim: int) -> int:
        """What each token adds to a head's D x D state, and reads from it.

        Table 2's 174.0 are those of one head with all 3072 channels; 24 heads of 128 take 7.2.
        """
        return 4 * heads * head_dim * (text + layout.image) * head_dim
