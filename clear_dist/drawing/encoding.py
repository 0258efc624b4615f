"""Pictures in bytes to latents, over stripes, and bytes of what is decoded.

Shapes: B pictures, C channels, R my rows, H rows of the picture, W columns.
"""

from typing import Any

import torch
from torch import Tensor

from clear_dist.comm.counters import Counters
from clear_dist.comm.group import Group
from clear_dist.comm.rows import StripeJoin
from clear_dist.geometry import Rows
from clear_dist.vae import encode_stripes


@torch.no_grad()
def encode_rows(vae: Any, pixels_BCRW: Tensor, group: Group, stripes: tuple[Rows, ...], counters: Counters) -> Tensor:
    """My rows [B, 2 * C, R, W] of what the VAE's encoder returns, means first, from my rows in bytes."""
    scaled_BCRW = in_vae_range(pixels_BCRW).to(vae.dtype)
    return encode_stripes(vae, scaled_BCRW, group, stripes, counters=counters)


def join_rows(rows_BCRW: Tensor, group: Group, stripes: tuple[Rows, ...], counters: Counters) -> Tensor:
    """Latents [B, C, H, W] of the whole picture, equal on all ranks."""
    tokens_BLC = rows_BCRW.flatten(2).transpose(1, 2).contiguous()
    whole_BLC = StripeJoin(group, stripes, counters).join(tokens_BLC)
    return whole_BLC.transpose(1, 2).unflatten(2, (-1, rows_BCRW.shape[3]))


def in_vae_range(pixels: Tensor) -> Tensor:
    """Bytes as numbers from -1 to 1."""
    return pixels.float().div_(127.5).sub_(1)


def to_bytes(pixels: Tensor) -> Tensor:
    """Bytes of what a decoder returns; what is beyond [-1, 1] is clamped."""
    return pixels.float().mul(127.5).add_(127.5).clamp_(0, 255).round_().to(torch.uint8)
