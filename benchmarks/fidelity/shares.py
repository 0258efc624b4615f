"""How far image queries look (Sec. 3.1, Fig. 4): attention recorded by relative position, and its share in a circle.

Shapes: B batch, N heads, L tokens, D head dim, H rows and W columns of the image.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.fidelity.stock import AllPairs
from clear_dist.training.attention import Layout


@dataclass(frozen=True, kw_only=True)
class Look:
    """Where a layer's image queries look in a step, the mean over them."""

    text: Tensor
    """Share of the text keys, [N]."""
    offsets: Tensor
    """Share of the image keys by rows below and columns right of the query, [N, 2 H - 1, 2 W - 1]."""

    def within(self, radius: int) -> Tensor:
        """Share of attention to the image that falls on keys less than `radius` tokens away, [N]."""
        seen = circle(self.offsets.shape[1:], radius)
        return (self.offsets * seen).sum(dim=(1, 2)) / self.offsets.sum(dim=(1, 2))


@dataclass(kw_only=True)
class Recorder(AllPairs):
    """Pattern of full attention that records `steps` of a denoising loop, the first of `passes` forwards of each."""

    steps: frozenset[int]
    passes: int
    looks: dict[tuple[int, int], list[Look]] = field(default_factory=dict)
    """By step and layer, one for each batch that was drawn."""
    _forwards: int = -1

    def begin(self) -> None:
        """The next forward is the first of a loop."""
        self._forwards = -1

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, layout: Layout, parameters: Mapping[str, Tensor]
    ) -> Tensor:
        self._forwards += layout.layer == 0
        step, others = divmod(self._forwards, self.passes)
        if others or step not in self.steps:
            return scaled_dot_product_attention(query, key, value)
        weights = (query @ key.transpose(2, 3) * query.shape[-1] ** -0.5).softmax(dim=-1)
        self.looks.setdefault((step, layout.layer), []).append(looked(weights, layout))
        return weights @ value


def looked(weights_BNLL: Tensor, layout: Layout) -> Look:
    """Where the image queries of attention [B, N, queries, keys] look."""
    _, of_image = layout.split(weights_BNLL)
    text, image = layout.split(of_image.transpose(2, 3))
    places = torch.cartesian_prod(torch.arange(layout.height), torch.arange(layout.width)).to(image.device)
    away = places[:, None] - places + torch.tensor([layout.height - 1, layout.width - 1], device=image.device)
    size = 2 * layout.height - 1, 2 * layout.width - 1
    index = (away[..., 0] * size[1] + away[..., 1]).flatten()
    summed = image.float().mean(dim=0).flatten(1)
    offsets = summed.new_zeros(len(summed), size[0] * size[1]).index_add_(1, index, summed) / layout.image
    return Look(text=text.float().sum(dim=2).mean(dim=(0, 2)).cpu(), offsets=offsets.unflatten(1, size).cpu())


def together(looks: list[Look]) -> Look:
    """Mean of several."""
    return Look(
        text=torch.stack([each.text for each in looks]).mean(dim=0),
        offsets=torch.stack([each.offsets for each in looks]).mean(dim=0),
    )


def uniform(height: int, width: int) -> Look:
    """A head that looks at all of the image alike."""
    rows, columns = (torch.cat([torch.arange(1, n + 1), torch.arange(n - 1, 0, -1)]) for n in (height, width))
    return Look(text=torch.zeros(1), offsets=(torch.outer(rows, columns) / (height * width) ** 2)[None])


def circle(size: tuple[int, ...], radius: int) -> Tensor:
    """Whether offsets around the middle of `size` are in CLEAR's circle (Eq. 3)."""
    down, across = (torch.arange(each) - each // 2 for each in size)
    return down.square()[:, None] + across.square() < radius**2
