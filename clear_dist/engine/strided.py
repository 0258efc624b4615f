"""AutoencoderKL with a stride, which diffusers' class is loaded without: the VAE of Diffusion-4K (F16) and its heirs.

Its encoder's first convolution takes every second pixel, its decoder's last one a picture enlarged twice: the same
tensors. Shapes: B pictures, C channels, H rows and W columns.
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from clear_dist.engine.reclassed import Reclassed

BEFORE = 2
"""Rows and columns of zeros above and left of what is enlarged; below and right there are none."""


class EnlargingConv(nn.Conv2d):
    """A decoder's last convolution, 3x3, of a picture enlarged twice (nearest), a pixel further down and right.

    As its makers decode by default, in four quarters: `partitioned` in vae.py of github.com/zhang0jhon/diffusion-4k.
    """

    def forward(self, x_BCHW: Tensor) -> Tensor:
        large_BCHW = F.interpolate(x_BCHW, scale_factor=2.0, mode="nearest")
        return F.conv2d(F.pad(large_BCHW, (BEFORE, 0, BEFORE, 0)), self.weight, self.bias)


def stride_of(vae: Any) -> int:
    return vae.config.get("stride", 1)


def scale_of(vae: Any) -> int:
    """Pixels along the side of a latent."""
    return 2 ** (len(vae.config.block_out_channels) - 1) * stride_of(vae)


def with_stride(vae: Any) -> Any:
    """The VAE, its layers as its own configuration says; raises ValueError for a stride that is neither 1 nor 2."""
    stride, last = stride_of(vae), None if stride_of(vae) == 1 else vae.decoder.conv_out
    if last is None or isinstance(last, EnlargingConv):
        return vae
    if stride != 2:
        raise ValueError(f"the stride of a VAE must be 1 or 2, got {stride}; nearest: 2")
    vae.encoder.conv_in.stride = (stride, stride)
    Reclassed.of(last, {nn.Conv2d: EnlargingConv})
    vae.tile_latent_min_size //= stride
    return vae


def fit_to_vae(pipe: Any) -> Any:
    """The pipeline, its VAE as configured and itself of that scale, which diffusers counts by blocks alone."""
    vae = getattr(pipe, "vae", None)
    if vae is None or stride_of(vae) == 1:
        return pipe
    with_stride(vae)
    times, pipe.vae_scale_factor = scale_of(vae) // pipe.vae_scale_factor, scale_of(vae)
    for name in ("image_processor", "mask_processor"):
        if (processor := getattr(pipe, name, None)) is not None:
            processor.register_to_config(vae_scale_factor=times * processor.config.vae_scale_factor)
    return pipe
