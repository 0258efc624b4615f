"""CLEAR with down-sampled keys in a single process, as the official LocalDownsampleFlexAttnProcessor computes it.

Written apart from the engine: one softmax over all text, image and pooled keys, with a dense mask over the whole image.
"""

from typing import Any

import torch
from torch import Tensor

from tests.oracle import DenseClearProcessor, softmax_attention
from tests.stale_oracle import StaleProcessor, stripes_of


def pooled(x: Tensor, weight: Tensor, height: int, width: int) -> Tensor:
    """From [B, H x W, N, D] and [1, 1, 1, d, 1, d, 1] to [B, H / d x W / d, N, D], token by token, in float64."""
    factor = weight.shape[3]
    across = width // factor
    out = torch.zeros(len(x), height // factor * across, *x.shape[2:], dtype=torch.float64)
    for token in range(height * width):
        y, column = divmod(token, width)
        place = weight[0, 0, 0, y % factor, 0, column % factor, 0]
        out[:, y // factor * across + column // factor] += place.double() * x[:, token].double()
    return out


class Pooled(DenseClearProcessor):
    """Image queries see pooled keys too: rotated keys' weighted sums. Text queries don't."""

    counted = 10
    height: int
    weight: Tensor
    """This layer's, [1, 1, 1, d, 1, d, 1]."""

    def attend_image(self, query: Tensor, key: Tensor, value: Tensor, seen: Tensor) -> Tensor:
        text = key.shape[1] - len(self.seen)
        few = [pooled(x[:, text:], self.weight, self.height, self.width) for x in (key, value)]
        all_of_them = torch.ones(len(seen), few[0].shape[1], dtype=torch.bool)
        key, value = (torch.cat(pair, dim=1) for pair in zip((key.double(), value.double()), few, strict=True))
        return softmax_attention(query.double(), key, value, torch.cat([seen, all_of_them], dim=1)).to(query.dtype)


class LatePooled(Pooled, StaleProcessor):
    """The stale schedule's: other stripes' keys were pooled in the step before."""


def stripes(height: int, ranks: int, factor: int) -> list[range]:
    """Rows of each rank, in whole units of `factor`."""
    return [range(factor * units.start, factor * units.stop) for units in stripes_of(height // factor, ranks)]


def pool_keys(pipe: Any, weights: dict[str, Tensor], *arguments: Any, height: int, width: int, **settings: Any) -> None:
    """Give a stock pipeline's layers such processors; `weights` by their names in a checkpoint.

    Args:
        arguments, settings: as DenseClearProcessor takes them, or with `ranks` as StaleProcessor does.
    """
    processors = {}
    for name in pipe.transformer.attn_processors:
        kind = LatePooled if "ranks" in settings else Pooled
        processors[name] = processor = kind(height, width, *arguments, **settings)
        processor.height, processor.weight = height, weights[f"{name}.spatial_weight"]
        if isinstance(processor, LatePooled):
            side = width if settings.get("by_columns") else height
            processor.stripes = stripes(side, settings["ranks"], processor.weight.shape[3])
            processor.text_parts = processor.stripes if settings["average"] else None
    pipe.transformer.set_attn_processor(processors)
