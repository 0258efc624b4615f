"""A tiny random Z-Image for `clear-dist verify` to draw with, on one rank and on many."""

import math
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
from torch import Tensor

SEED, STEPS, PIXELS = 0, 2, 16
HEADS, HEAD_DIM, TEXT_WIDTH, TEXT_TOKENS = 2, 16, 24, 8


class ZImageSample:
    name = "Z-Image"
    steps = STEPS
    text_shape: tuple[int, ...] = (1, 512, 30, 128)

    def pipeline(self, device: torch.device, dtype: torch.dtype) -> Any:
        transformer = ZImageTransformer2DModel(
            in_channels=16, dim=HEADS * HEAD_DIM, n_layers=1, n_refiner_layers=1, n_heads=HEADS, n_kv_heads=HEADS,
            cap_feat_dim=TEXT_WIDTH, axes_dims=[4, 6, 6], axes_lens=[64, 512, 512],
        )  # fmt: skip
        generator = torch.Generator().manual_seed(SEED)
        for name, parameter in transformer.named_parameters():
            parameter.data.copy_(_drawn_weight(name, parameter, generator))
        parts = dict.fromkeys(("vae", "text_encoder", "tokenizer"))
        scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
        pipe = ZImagePipeline(transformer=transformer.eval().to(device, dtype), scheduler=scheduler, **parts)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def draw(self, pipe: Any, grid: tuple[int, int]) -> Tensor:
        """Latents [1, 16, 2 x height, 2 x width]."""
        generator = torch.Generator().manual_seed(SEED)
        device, dtype = pipe.transformer.device, pipe.transformer.dtype
        caption = torch.randn(TEXT_TOKENS, TEXT_WIDTH, generator=generator).to(device, dtype)
        return pipe(
            prompt_embeds=[caption],
            height=PIXELS * grid[0],
            width=PIXELS * grid[1],
            num_inference_steps=STEPS,
            guidance_scale=0.0,
            generator=generator,
            output_type="latent",
        ).images


def _drawn_weight(name: str, like: Tensor, generator: torch.Generator) -> Tensor:
    """Noise at which attention and modulation matter: outputs of order 1, scores with a spread of 2."""
    noise = torch.randn(like.shape, generator=generator)
    if name.endswith("pad_token"):
        return noise
    if like.ndim > 1:
        return (3.0 if ".to_v." in name else 1.0) * noise / math.sqrt(like.shape[1])
    if name.endswith("bias"):
        return 0.2 * noise
    return (1.4 if "norm_q" in name or "norm_k" in name else 1.0) + 0.1 * noise
