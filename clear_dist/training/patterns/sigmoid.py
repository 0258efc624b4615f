"""Sigmoid attention (Eq. 9): each pair of a query and a key by itself, nothing normalised."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import log

from torch import Tensor

from clear_dist.training.attention import Layout


@dataclass(frozen=True)
class Sigmoid:
    """Text is treated as the image is; b is minus the logarithm of the number of keys, as FlashSigmoid advises."""

    def parameters(self, layout: Layout, heads: int, head_dim: int) -> Mapping[str, Tensor]:
        return {}

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, layout: Layout, parameters: Mapping[str, Tensor]
    ) -> Tensor:
        scores = query @ key.transpose(2, 3) * query.shape[-1] ** -0.5
        return (scores - log(key.shape[2])).sigmoid() @ value

    def operations(self, layout: Layout, text: int, heads: int, head_dim: int) -> int:
        return 4 * heads * head_dim * (text + layout.image) ** 2
