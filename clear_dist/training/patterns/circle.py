"""CLEAR's circle (Eq. 3): image queries see the text and the keys less than `radius` tokens away, strictly.

With a down factor d each d x d keys make one more for all image queries, by weights that a layer learns. On CUDA it is
FlexAttention; elsewhere tiles of queries, each with a dense mask over the keys around it.

Shapes: B batch, N heads, L tokens, D head dim, T text tokens, H rows and W columns, P pooled keys.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from clear_dist.attention import flex
from clear_dist.attention.backend import WindowCall
from clear_dist.cards.clear import SPATIAL_WEIGHT, spatial_shape
from clear_dist.evaluate.operations import attended
from clear_dist.training.attention import Layout

WEIGHT = SPATIAL_WEIGHT.rpartition(".")[2]
TILE = 16
"""Side in tokens of a tile of queries."""
SMALL = 1024
"""Image tokens up to which one mask over all of them is faster."""
Span = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class Circle:
    radius: int
    down_factor: int = 1

    def parameters(self, layout: Layout, heads: int, head_dim: int) -> Mapping[str, Tensor]:
        """Where the image sees the text, a weight that begins as the mean of d x d keys."""
        factor = self.down_factor
        is_pooled = factor > 1 and layout.sees_text
        return {WEIGHT: torch.full(spatial_shape(factor), factor**-2.0)} if is_pooled else {}

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, layout: Layout, parameters: Mapping[str, Tensor]
    ) -> Tensor:
        (text, query), (text_key, image_key), (text_value, image_value) = map(layout.split, (query, key, value))
        out_text = scaled_dot_product_attention(text, key, value) if text.shape[2] else text
        if WEIGHT in parameters:
            pooled = (pooled_keys(x, layout, parameters[WEIGHT]) for x in (image_key, image_value))
            text_key, text_value = (torch.cat(pair, dim=2) for pair in zip((text_key, text_value), pooled, strict=True))
        attend = by_flex if query.is_cuda else by_tiles
        return layout.join(out_text, attend(query, image_key, image_value, text_key, text_value, layout, self.radius))

    def operations(self, layout: Layout, text: int, heads: int, head_dim: int) -> int:
        factor = self.down_factor if layout.sees_text else 1
        grid = layout.height, layout.width
        return 4 * heads * head_dim * attended(grid, self.radius, down_factor=factor, text_tokens=text)


def pooled_keys(x_BNLD: Tensor, layout: Layout, weight: Tensor) -> Tensor:
    """Weighted sums over d x d tokens, [B, N, P, D]."""
    factor = weight.shape[3]
    tiles = x_BNLD.unflatten(2, (layout.height // factor, factor, layout.width // factor, factor))
    return (tiles * weight.reshape(factor, 1, factor, 1)).sum(dim=(3, 5)).flatten(2, 3)


def by_tiles(
    query: Tensor, key: Tensor, value: Tensor, text_key: Tensor, text_value: Tensor, layout: Layout, radius: int
) -> Tensor:
    side = max(layout.height, layout.width) if layout.image <= SMALL else TILE
    query, key, value = (x.unflatten(2, (layout.height, layout.width)) for x in (query, key, value))
    rows = []
    for down, rows_seen in _spans(layout.height, side, radius):
        row = []
        for across, columns_seen in _spans(layout.width, side, radius):
            keys, values = (
                torch.cat([text, x[:, :, slice(*rows_seen), slice(*columns_seen)].flatten(2, 3)], dim=2)
                for text, x in ((text_key, key), (text_value, value))
            )
            queries = query[:, :, slice(*down), slice(*across)]
            mask = _mask((down, across), (rows_seen, columns_seen), radius, text_key.shape[2], query.device)
            out = scaled_dot_product_attention(queries.flatten(2, 3), keys, values, attn_mask=mask)
            row.append(out.unflatten(2, queries.shape[2:4]))
        rows.append(torch.cat(row, dim=3))
    return torch.cat(rows, dim=2).flatten(2, 3)


def by_flex(
    query: Tensor, key: Tensor, value: Tensor, text_key: Tensor, text_value: Tensor, layout: Layout, radius: int
) -> Tensor:
    """Pooled keys are text to it: all image queries see both."""
    grid = layout.height, layout.width
    image = (x.transpose(1, 2).unflatten(1, grid) for x in (query, key, value))
    call = WindowCall(
        **dict(zip(("query", "key", "value"), image, strict=True)),
        key_text=text_key.transpose(1, 2),
        value_text=text_value.transpose(1, 2),
        radius=radius,
        row_offset=0,
        scale=query.shape[-1] ** -0.5,
    )
    return flex.run(call, trains=True)[0].flatten(1, 2).transpose(1, 2)


def _spans(size: int, side: int, radius: int) -> list[tuple[Span, Span]]:
    """Along one dimension: of each tile the queries, and the keys that they may see."""
    ends = [(first, min(first + side, size)) for first in range(0, size, side)]
    return [((first, end), (max(first - radius + 1, 0), min(end + radius - 1, size))) for first, end in ends]


@lru_cache(maxsize=64)
def _mask(queries: tuple[Span, Span], keys: tuple[Span, Span], radius: int, text: int, device: torch.device) -> Tensor:
    """True [queries, text + keys] where a key is seen."""
    down, across = (
        torch.arange(*query, device=device)[:, None] - torch.arange(*key, device=device)
        for query, key in zip(queries, keys, strict=True)
    )
    circle = (down.square()[:, None, :, None] + across.square()[None, :, None, :] < radius**2).flatten(2).flatten(0, 1)
    return torch.cat([circle.new_ones(len(circle), text), circle], dim=1)
