"""Tiny random ControlNets for the tiny FLUX, and pictures to control it with."""

from typing import Any

import torch
from diffusers import (
    FluxControlNetImg2ImgPipeline,
    FluxControlNetInpaintPipeline,
    FluxControlNetModel,
    FluxControlNetPipeline,
    FluxMultiControlNetModel,
)
from torch import Tensor

from tests.tiny import CLIP_WIDTH, T5_WIDTH, draw_weights, make_tiny_pipeline

KINDS = {
    "text": FluxControlNetPipeline,
    "picture": FluxControlNetImg2ImgPipeline,
    "mask": FluxControlNetInpaintPipeline,
}


def make_tiny_controlnet(
    *, seed: int = 5, modes: int | None = None, hint: bool = False, head_dim: int = 16
) -> FluxControlNetModel:
    """A ControlNet on the CPU in float32, its residuals of order 1.

    Args:
        modes: of a union; None: none.
        hint: reads pixels, as XLabs' do, not latents.
    """
    net = FluxControlNetModel(
        num_layers=1,
        num_single_layers=2,
        num_attention_heads=32 // head_dim,
        attention_head_dim=head_dim,
        axes_dims_rope=(4, 6, 6),
        joint_attention_dim=T5_WIDTH,
        pooled_projection_dim=CLIP_WIDTH,
        guidance_embeds=True,
        num_mode=modes,
        conditioning_embedding_channels=16 if hint else None,
        patch_size=2 if hint else 1,
    )
    return draw_weights(net, torch.Generator().manual_seed(seed))


def make_tiny_controlled(*nets: FluxControlNetModel, start: str = "text", multi: bool | None = None) -> Any:
    """A pipeline of KINDS with these ControlNets; with several, or on demand, they are a FluxMultiControlNetModel."""
    several = len(nets) > 1 if multi is None else multi
    controlnet = FluxMultiControlNetModel(list(nets)) if several else nets[0]
    parts = make_tiny_pipeline(double_blocks=2, single_blocks=2).components
    if start != "text":
        parts = {name: part for name, part in parts.items() if name not in ("image_encoder", "feature_extractor")}
    return KINDS[start](**parts, controlnet=controlnet)


def picture(height: int, width: int, seed: int) -> Tensor:
    """[1, 3, H, W] in [0, 1], of so many tokens."""
    return torch.rand(1, 3, 16 * height, 16 * width, generator=torch.Generator().manual_seed(seed))
