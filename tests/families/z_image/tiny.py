"""A tiny random Z-Image: real configuration classes, 16 pixels a token, made in a second or two."""

from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel

from tests.families.tiny import make_qwen3, make_qwen_tokenizer
from tests.tiny import draw_weights, make_vae

TEXT_WIDTH = 24
POSITIONS = 48
"""Rows, and columns, of tokens that have positions: 768 pixels."""
TURBO_SHIFT, BASE_SHIFT = 3.0, 6.0
"""Shifts of the schedules."""


def make_tiny_z_image(*, layers: int = 2, refiners: int = 1, shift: float = TURBO_SHIFT, sample_size: int = 128) -> Any:
    """A ZImagePipeline on the CPU in float32; equal weights in every process."""
    transformer = ZImageTransformer2DModel(
        in_channels=16,
        dim=32,
        n_layers=layers,
        n_refiner_layers=refiners,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=TEXT_WIDTH,
        axes_dims=[4, 6, 6],
        axes_lens=[1024, POSITIONS, POSITIONS],
    )
    tokenizer, generator = make_qwen_tokenizer(), torch.Generator().manual_seed(0)
    return ZImagePipeline(
        transformer=draw_weights(transformer, generator),
        vae=draw_weights(make_vae(sample_size), generator),
        text_encoder=draw_weights(make_qwen3(tokenizer, width=TEXT_WIDTH, layers=2), generator),
        tokenizer=tokenizer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=shift),
    )
