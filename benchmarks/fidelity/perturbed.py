"""Full attention with other relative positions in its rotary embedding (Sec. 3.1, Fig. 5).

FLUX turns queries and keys by their own positions, so that a score depends on the difference of both, on each axis by
itself. Here each pair of image tokens gets a difference of its own. Pairs with text, which has no place in the image,
keep theirs.

Shapes: B batch, N heads, L tokens, D head dim, H and Y rows, W and X columns of the image.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.fidelity.stock import AllPairs
from clear_dist.engine.references import raster_ids
from clear_dist.training.attention import Layout

Change = Callable[[Tensor], Tensor]


def clipped(distances: Tensor, *, radius: int) -> Tensor:
    """Differences of at most `radius` rows or columns: remote features are perturbed."""
    return distances.clamp(-radius, radius)


def raised(distances: Tensor, *, radius: int) -> Tensor:
    """Differences of at least `radius` rows or columns, 0 becoming `radius`: local features are perturbed."""
    return torch.where(distances < 0, distances.clamp(max=-radius), distances.clamp(min=radius))


CHANGES: Mapping[str, Callable[..., Tensor]] = {"clipped": clipped, "raised": raised}


@dataclass(frozen=True, kw_only=True)
class Perturbed(AllPairs):
    """Pattern for FLUX; `embed` is its transformer's `pos_embed`, `change` makes other differences of the true ones."""

    embed: nn.Module
    change: Change

    @classmethod
    def by(cls, kind: str, radius: int, embed: nn.Module) -> "Perturbed":
        return cls(embed=embed, change=partial(CHANGES[kind], radius=radius))

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, layout: Layout, parameters: Mapping[str, Tensor]
    ) -> Tensor:
        assert layout.text_first, "as in FLUX"
        text = query.shape[2] - layout.image
        scores = query @ key.transpose(2, 3)
        scores[:, :, text:, text:] = self._image_scores(query[:, :, text:], key[:, :, text:], layout)
        return (scores * query.shape[-1] ** -0.5).softmax(dim=-1) @ value

    def _image_scores(self, query: Tensor, key: Tensor, layout: Layout) -> Tensor:
        """[B, N, H W, Y X], of queries and keys that their own positions have turned."""
        cos, sin = self.embed(raster_ids(layout.height, layout.width, query.device))
        grid = layout.height, layout.width
        parts = (
            turned(x.float(), cos, -sin).unflatten(2, grid).split(self.embed.axes_dim, dim=-1) for x in (query, key)
        )
        still, rows, columns = zip(*parts, strict=True)
        scores = torch.einsum("bnhwd,bnyxd->bnhwyx", *still)
        cos, sin = (x[:, :, None] for x in self._between(1, layout.height, query.device))
        scores += torch.einsum("bnhwd,bnhyxd->bnhwyx", rows[0], turned(rows[1][:, :, None], cos, sin))
        cos, sin = (x[:, None] for x in self._between(2, layout.width, query.device))
        scores += torch.einsum("bnhwd,bnwyxd->bnhwyx", columns[0], turned(columns[1][:, :, None], cos, sin))
        return scores.flatten(4, 5).flatten(2, 3).to(query.dtype)

    def _between(self, axis: int, count: int, device: torch.device) -> tuple[Tensor, ...]:
        """Cosines and sines [count, count, D of the axis] of the changed differences of keys to queries."""
        places = torch.arange(count, device=device, dtype=torch.float32)
        ids = torch.zeros(count * count, len(self.embed.axes_dim), device=device)
        ids[:, axis] = self.change(places - places[:, None]).flatten()
        return tuple(x.split(self.embed.axes_dim, dim=-1)[axis].unflatten(0, (count, count)) for x in self.embed(ids))


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Pairs of channels [..., D] turned, as diffusers' `apply_rotary_emb` does with FLUX's."""
    real, imaginary = x.unflatten(-1, (-1, 2)).unbind(-1)
    return x * cos + torch.stack([-imaginary, real], dim=-1).flatten(-2) * sin
