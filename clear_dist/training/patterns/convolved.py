"""PixArt-Sigma's compression (Eq. 10): the image's keys and values, convolved with a stride."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import conv2d

from clear_dist.training.attention import Layout
from clear_dist.training.patterns.compressed import Compressed, as_picture, as_tokens


@dataclass(frozen=True, kw_only=True)
class Convolved(Compressed):
    """A learned kernel of `factor` x `factor` for each channel of keys, and of values; it begins as their mean."""

    factor: int

    def parameters(self, layout: Layout, heads: int, head_dim: int) -> Mapping[str, Tensor]:
        if layout.height % self.factor or layout.width % self.factor:
            nearest = [self.factor * max(1, round(side / self.factor)) for side in (layout.height, layout.width)]
            raise ValueError(
                f"sides of the image must be multiples of the {self.factor} tokens that are convolved to one, "
                f"got {layout.height} x {layout.width}; nearest: {nearest[0]} x {nearest[1]}"
            )
        mean = torch.full((heads * head_dim, 1, self.factor, self.factor), self.factor**-2.0)
        return {"key_kernel": mean, "value_kernel": mean.clone()}

    def compress(
        self, query: Tensor, key: Tensor, value: Tensor, layout: Layout, parameters: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        return (
            self._convolved(key, layout, parameters["key_kernel"]),
            self._convolved(value, layout, parameters["value_kernel"]),
        )

    def _convolved(self, x_BNID: Tensor, layout: Layout, kernel: Tensor) -> Tensor:
        picture = as_picture(x_BNID, layout)
        return as_tokens(
            conv2d(picture, kernel.to(picture.dtype), stride=self.factor, groups=len(kernel)), x_BNID.shape[1]
        )

    def compressed(self, layout: Layout) -> int:
        return layout.image // self.factor**2
