"""The three operations of a VAE that look beyond a pixel, on stripes: convolution, group norm, attention.

`convolve` fills a stripe's two halo rows just before it reads them. Work is done in chunks of rows, which bound the
temporary tensors and stay below 2^31 elements, beyond which several GPU kernels cannot count.

Shapes: B batch, C channels, R my rows, E = R + 2 my rows with halos, W columns, L = R * W positions, S positions of the
whole picture, G groups of channels.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from clear_dist.comm.counters import Counters
from clear_dist.comm.group import Group
from clear_dist.comm.rows import StripeJoin, fill_halos
from clear_dist.engine.strided import BEFORE, EnlargingConv
from clear_dist.geometry import Rows
from clear_dist.vae import attended

Pointwise = Callable[[Tensor], Tensor]
"""Map of [B, C, rows, W] that treats each row by itself."""

FUSED = (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION)
BYTES_PER_VALUE = 12  # at most three temporary tensors of float32 at a time


@dataclass(frozen=True)
class StripeOps:
    """Operations of one decode or encode; all ranks call the same ones in the same order."""

    group: Group
    stripes: tuple[Rows, ...]
    max_bytes: int
    counters: Counters
    by_products: bool = False
    """Whether attention goes by products of blocks, as on GPUs: no fused kernel is fast with a head as wide."""

    def convolve(
        self,
        x_BCEW: Tensor,
        conv: nn.Conv2d,
        before: Pointwise | None = None,
        *,
        upsample: bool = False,
        after: Callable[[Tensor, slice], Tensor] | None = None,
        out_BCEW: Tensor | None = None,
    ) -> Tensor:
        """3x3 convolution, halos not filled: stride 1 with zeros around, or stride 2 as the layer's padding says.

        Args:
            upsample: whether the input, after `before`, is made twice as high and wide (nearest).
            after: applied to a chunk of the output and its rows in the output.
            out_BCEW: None: new memory. At stride 1 it may share that of `x_BCEW` from one row above: then a chunk is
                written where no later one reads.
        """
        fill_halos(x_BCEW, self.group, self.counters)
        step, zoom = conv.stride[0], 2 if upsample else 1
        if out_BCEW is None:
            batch, _, extended, width = x_BCEW.shape
            rows_out = (extended - 2) // step * zoom
            out_BCEW = x_BCEW.new_empty(batch, conv.out_channels, rows_out + 2, width // step * zoom)
        for rows in self._chunks(x_BCEW, (conv.in_channels + conv.out_channels) * zoom**2, step):
            kept = slice(rows.start // step * zoom + 1, rows.stop // step * zoom + 1)
            piece = _convolve(self._framed(x_BCEW, rows, before), conv, upsample)
            out_BCEW[:, :, kept] = piece if after is None else after(piece, kept)
        return out_BCEW

    def normalised(self, x_BCEW: Tensor, norm: nn.GroupNorm, activation: Pointwise | None = None) -> Pointwise:
        """`activation(norm(.))` for rows of `x_BCEW`, with the moments of the whole picture."""
        mean_BG, variance_BG = self._moments(x_BCEW, norm.num_groups)
        deviation_BG = (variance_BG + norm.eps).sqrt()
        mean_BC, deviation_BC = (
            moment.repeat_interleave(norm.num_channels // norm.num_groups, dim=1) for moment in (mean_BG, deviation_BG)
        )
        scale_BC = norm.weight.double() / deviation_BC
        shift_BC = norm.bias.double() - mean_BC * scale_BC
        scale, shift = (factor.float()[..., None, None] for factor in (scale_BC, shift_BC))

        def apply(rows: Tensor) -> Tensor:
            normed = torch.addcmul(shift, rows, scale).to(rows.dtype)
            return normed if activation is None else activation(normed)

        return apply

    def attend(self, query_BLC: Tensor, key_BLC: Tensor, value_BLC: Tensor, heads: int) -> Tensor:
        """Attention [B, L, C] to the whole picture; RuntimeError without a fused kernel (others hold all scores)."""
        join = StripeJoin(self.group, self.stripes, self.counters)
        parts = query_BLC, join.join(key_BLC), join.join(value_BLC)
        query, key, value = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in parts)
        buffers = attended.Buffers.like(query[0, 0], self.max_bytes) if self.by_products else None
        if buffers is None or query.is_meta:  # without values: buffers and operations are counted as they are
            with sdpa_kernel(list(FUSED)):
                return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        out_BLC = torch.empty_like(query_BLC)
        out = out_BLC.unflatten(-1, (heads, -1)).transpose(1, 2)
        for of_picture in zip(query, key, value, out, strict=True):
            for of_head in zip(*of_picture, strict=True):
                attended.attend(*of_head, buffers)
        return out_BLC

    def _moments(self, x_BCEW: Tensor, groups: int) -> tuple[Tensor, Tensor]:
        """Mean and variance over the whole picture, [B, G] each, in float64."""
        sums_3BG = x_BCEW.new_zeros(3, x_BCEW.shape[0], groups, dtype=torch.float64)
        for rows in self._chunks(x_BCEW, x_BCEW.shape[1]):
            values = x_BCEW[:, :, rows.start + 1 : rows.stop + 1].float().unflatten(1, (groups, -1))
            mean_BG111 = values.mean(dim=(2, 3, 4), keepdim=True)
            # Centred first, or float32 would lose a small variance around a large mean. (`var_mean` is slow on CPU.)
            variance_BG = (values - mean_BG111).square_().mean(dim=(2, 3, 4)).double()
            mean_BG = mean_BG111.double().flatten(1)
            parts = torch.stack([torch.ones_like(mean_BG), mean_BG, variance_BG + mean_BG.square()])
            sums_3BG += parts * values[0, 0].numel()
        self.counters.add("other_bytes", sums_3BG.nbytes)
        count_BG, sum_BG, squares_BG = self.group.all_reduce(sums_3BG, "sum")
        mean_BG = sum_BG / count_BG
        return mean_BG, (squares_BG / count_BG - mean_BG.square()).clamp_min(0.0)

    def _framed(self, x_BCEW: Tensor, rows: Rows, before: Pointwise | None) -> Tensor:
        """`before` of these rows and one more on either side; zeros beyond the border of the picture."""
        piece = x_BCEW[:, :, rows.start : rows.stop + 2]
        piece = piece if before is None else before(piece)
        if rows.start == 0 and self.group.rank == 0:
            piece[:, :, 0] = 0
        if rows.stop == x_BCEW.shape[2] - 2 and self.group.rank == self.group.size - 1:
            piece[:, :, -1] = 0
        return piece

    def _chunks(self, x_BCEW: Tensor, channels: int, step: int = 1) -> Iterator[Rows]:
        """Pieces of whole `step`s whose temporary tensors (`channels` in all) stay within the limit."""
        batch, _, extended, width = x_BCEW.shape
        rows = self.max_bytes // (batch * width * channels * BYTES_PER_VALUE) - 2
        rows = max(1, rows // step) * step
        for start in range(0, extended - 2, rows):
            yield Rows(start, min(start + rows, extended - 2))


def frame(rows_BCRW: Tensor) -> Tensor:
    """Stripe [B, C, R + 2, W] of rows, its halos not filled."""
    return F.pad(rows_BCRW, (0, 0, 1, 1))


def unframe(stripe_BCEW: Tensor) -> Tensor:
    """Rows [B, C, R, W] of a stripe, without the halos."""
    return stripe_BCEW[:, :, 1:-1]


def _convolve(framed: Tensor, conv: Any, upsample: bool) -> Tensor:
    if upsample:
        framed = F.interpolate(framed, scale_factor=2.0, mode="nearest")
        if isinstance(conv, EnlargingConv):
            return F.conv2d(F.pad(framed[:, :, :-2], (BEFORE, 0)), conv.weight, conv.bias)
        framed = framed[:, :, 1:-1]
    if conv.stride[0] == 1:
        return F.conv2d(framed, conv.weight, conv.bias, padding=(0, 1))
    if conv.padding[0] == 1:  # a strided VAE's first: zeros above and on the left
        return F.conv2d(framed[:, :, :-1], conv.weight, conv.bias, stride=conv.stride, padding=(0, 1))
    # As diffusers' Downsample2D: nothing above and on the left, one column of zeros on the right.
    return F.conv2d(F.pad(framed[:, :, 1:], (0, 1)), conv.weight, conv.bias, stride=conv.stride)
