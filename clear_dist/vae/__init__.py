"""diffusers' AutoencoderKL over stripes: each rank decodes or encodes its own rows, exactly, without tiles or seams.

    pixels = decode_stripes(vae, my_rows_of_latents, group, stripes)
    moments = encode_stripes(vae, my_rows_of_pixels, group, stripes)

Convolutions exchange one halo row, group norms their moments, mid-block attention its keys and values.
A rank holds two feature maps of its rows and a chunk's temporary tensors: at 8192 px on 8 ranks in bfloat16 at most
6.6 GB, of which 4.3 and 2.1 are 256 and 128 channels at full size.

Shapes: B batch, C channels, R my rows, W columns.
"""

from collections.abc import Sequence

import torch
from diffusers import AutoencoderKL
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor

from clear_dist.comm.counters import Counters
from clear_dist.comm.group import Group
from clear_dist.engine.strided import scale_of
from clear_dist.geometry import Rows
from clear_dist.vae import attended
from clear_dist.vae.layers import Layer, decoder_layers, encoder_layers
from clear_dist.vae.stripe_ops import StripeOps, frame, unframe
from clear_dist.weights.offload import brought

MAX_BYTES = {"cpu": 1 << 25, "cuda": 1 << 28}
"""Limit of a chunk's temporary tensors, by device: a CPU wants them small, a GPU wants few calls."""


# The hook brings an offloaded VAE to its device, as for its own methods.
@apply_forward_hook
@torch.no_grad()
def decode_stripes(
    vae: AutoencoderKL,
    latents_BCRW: Tensor,
    group: Group,
    stripes: tuple[Rows, ...],
    *,
    max_bytes: int | None = None,
    counters: Counters | None = None,
    by_products: bool | None = None,
) -> Tensor:
    """This rank's rows of `vae.decode(latents).sample`, [B, C, R * 8, W * 8] at scale 8; all ranks call this.

    Args:
        latents_BCRW: this rank's rows, scaled for the VAE, in its dtype and on the group's device.
        stripes: each rank's rows, from `cut_in_stripes`, in any common unit, such as tokens.
        max_bytes: limit of one chunk's temporary tensors; a chunk has one row at least. None: MAX_BYTES.
        by_products: how attention is computed (`StripeOps`). None: by what this device is fast with.

    Raises ValueError (rows that don't fit the stripe, `max_bytes` not positive, blocks unknown here) or PeerLost.
    """
    ops = _ops(latents_BCRW, group, stripes, max_bytes, counters, by_products)
    with brought(vae):
        if vae.post_quant_conv is not None:
            latents_BCRW = vae.post_quant_conv(latents_BCRW)
        return _run(list(decoder_layers(ops, vae.decoder)), latents_BCRW)


@apply_forward_hook
@torch.no_grad()
def encode_stripes(
    vae: AutoencoderKL,
    pixels_BCRW: Tensor,
    group: Group,
    stripes: tuple[Rows, ...],
    *,
    max_bytes: int | None = None,
    counters: Counters | None = None,
    by_products: bool | None = None,
) -> Tensor:
    """This rank's rows of `vae.encode(pixels).latent_dist.parameters`, pixels being in [-1, 1]; all ranks call this.

    Returns [B, 2 * C, R / 8, W / 8] at scale 8: means, then logarithms of variances. To sample, join the rows first:
    noise drawn by rank would depend on their number. Raises as `decode_stripes`, and where the scale doesn't divide R.
    """
    scale = scale_of(vae)
    ops = _ops(pixels_BCRW, group, stripes, max_bytes, counters, by_products)
    if pixels_BCRW.shape[2] % scale:
        raise ValueError(f"a stripe to encode must have a multiple of {scale} rows, got {pixels_BCRW.shape[2]}")
    with brought(vae):
        moments_BCRW = _run(list(encoder_layers(ops, vae.encoder)), pixels_BCRW)
        return moments_BCRW if vae.quant_conv is None else vae.quant_conv(moments_BCRW)


def _run(layers: Sequence[Layer], rows_BCRW: Tensor) -> Tensor:
    stripe_BCEW = frame(rows_BCRW)
    for layer in layers:
        stripe_BCEW = layer(stripe_BCEW)
    return unframe(stripe_BCEW).contiguous()


def _ops(
    rows_BCRW: Tensor,
    group: Group,
    stripes: tuple[Rows, ...],
    max_bytes: int | None,
    counters: Counters | None,
    by_products: bool | None,
) -> StripeOps:
    stripe = len(stripes[group.rank])
    if rows_BCRW.ndim != 4 or rows_BCRW.shape[2] == 0 or rows_BCRW.shape[2] % stripe:
        raise ValueError(f"rows must be [B, C, R, W] with R a multiple of {stripe}, got {tuple(rows_BCRW.shape)}")
    most = MAX_BYTES.get(group.device.type, MAX_BYTES["cuda"]) if max_bytes is None else max_bytes
    if most < 1:
        raise ValueError(f"max_bytes must be at least 1, got {most}")
    if by_products is None:
        by_products = group.device.type == "cuda" and attended.takes(group.device.type, rows_BCRW.dtype)
    return StripeOps(group, stripes, max_bytes=most, counters=counters or Counters(), by_products=by_products)
