"""One layer's attention on one rank, in several ways, and a timer whose candidates take turns.

Shape suffixes: B batch, L text and image tokens, R rows, W columns, N heads, T text tokens, D head dim.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.lib.row_major import row_major_attention, row_major_mask
from clear_dist.attention import Backend, attend, window_attention
from clear_dist.attention.backend import CallShape

SHORTEST = 0.02
"""Seconds; shorter calls are timed several times in a row."""


@dataclass(frozen=True, kw_only=True)
class Layer:
    """Random inputs for a square image of `side` tokens."""

    query: Tensor
    """[B, L, N, D] as `key` and `value`, text tokens first."""
    key: Tensor
    value: Tensor
    side: int
    text: int

    def request(self, radius: int) -> CallShape:
        """The question to a backend whether it can run this layer."""
        heads, head_dim = self.query.shape[2:]
        sizes = self.side, self.side, self.side, self.text, radius
        return CallShape(self.query.device.type, self.query.dtype, head_dim, heads, *sizes)

    def split(self, x_BLND: Tensor) -> tuple[Tensor, Tensor]:
        """Views [B, T, N, D] and [B, R, W, N, D]."""
        return x_BLND[:, : self.text], x_BLND[:, self.text :].unflatten(1, (self.side, self.side))


def make_layer(side: int, *, text: int, heads: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> Layer:
    shape = (1, text + side**2, heads, head_dim)
    query, key, value = (torch.randn(shape, device=device, dtype=dtype) for _ in range(3))
    return Layer(query=query, key=key, value=value, side=side, text=text)


def full(layer: Layer) -> Tensor:
    """Full attention [B, L, N, D] by PyTorch, without a mask."""
    query, key, value = (x.transpose(1, 2) for x in (layer.query, layer.key, layer.value))
    return scaled_dot_product_attention(query, key, value).transpose(1, 2)


def window(layer: Layer, radius: int, backend: Backend) -> Tensor:
    """CLEAR's attention [B, L, N, D], as the engine computes it on one rank."""
    output = torch.empty_like(layer.query)
    output_text, output_image = layer.split(output)
    output_text.copy_(attend(layer.split(layer.query)[0], layer.key, layer.value)[0])
    output_image.copy_(image_attention(layer, radius, backend))
    return output


def image_attention(layer: Layer, radius: int, backend: Backend) -> Tensor:
    """CLEAR's attention of the image queries alone [B, R, W, N, D]."""
    (_, query), (text_key, key), (text_value, value) = (layer.split(x) for x in (layer.query, layer.key, layer.value))
    return window_attention(query, key, value, text_key, text_value, radius=radius, row_offset=0, backend=backend)[0]


def row_major(layer: Layer, radius: int) -> Callable[[], Tensor]:
    """CLEAR in the official code's layout: the mask is made here, the kernel is compiled at the first call."""
    mask = row_major_mask((layer.side, layer.side), layer.text, radius, layer.query.device)
    return lambda: row_major_attention(layer.query, layer.key, layer.value, mask)


def interleaved(candidates: list[Callable[[], Tensor]], repetitions: int) -> list[float]:
    """Median seconds of each candidate; they take turns, after two warm-up runs each."""
    calls = []
    for candidate in candidates:
        candidate()
        calls.append(max(1, round(SHORTEST / seconds(candidate))))
    rounds = [
        [seconds(candidate, times) for candidate, times in zip(candidates, calls, strict=True)]
        for _ in range(repetitions)
    ]
    return [median(times) for times in zip(*rounds, strict=True)]


def seconds(candidate: Callable[[], Tensor], calls: int = 1) -> float:
    """Wall seconds of one call, averaged over `calls` in a row; the GPU's queue is empty before and after."""
    synchronize = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        candidate()
    synchronize()
    return (time.perf_counter() - start) / calls
