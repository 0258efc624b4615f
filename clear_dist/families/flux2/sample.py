"""A tiny random FLUX.2 for `clear-dist verify` to draw with, on one rank and on many."""

import math
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Flux2Pipeline, Flux2Transformer2DModel
from torch import Tensor

SEED, STEPS, PIXELS = 0, 2, 16
HEADS, HEAD_DIM, TEXT_WIDTH, TEXT_TOKENS = 2, 16, 24, 8


class Flux2Sample:
    name = "FLUX.2"
    steps = STEPS
    text_shape: tuple[int, ...] = (1, 512, 24, 128)

    def pipeline(self, device: torch.device, dtype: torch.dtype) -> Any:
        transformer = Flux2Transformer2DModel(
            in_channels=128, num_layers=1, num_single_layers=1, num_attention_heads=HEADS, attention_head_dim=HEAD_DIM,
            axes_dims_rope=(4, 4, 4, 4), joint_attention_dim=TEXT_WIDTH,
        )  # fmt: skip
        generator = torch.Generator().manual_seed(SEED)
        for name, parameter in transformer.named_parameters():
            parameter.data.copy_(_drawn_weight(name, parameter, generator))
        parts = dict.fromkeys(("vae", "text_encoder", "tokenizer"))
        scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
        pipe = Flux2Pipeline(transformer=transformer.eval().to(device, dtype), scheduler=scheduler, **parts)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def draw(self, pipe: Any, grid: tuple[int, int]) -> Tensor:
        """Packed latents [1, height x width, 128]."""
        generator = torch.Generator().manual_seed(SEED)
        embeddings = torch.randn(1, TEXT_TOKENS, TEXT_WIDTH, generator=generator)
        return pipe(
            prompt_embeds=embeddings.to(pipe.transformer.device, pipe.transformer.dtype),
            height=PIXELS * grid[0],
            width=PIXELS * grid[1],
            num_inference_steps=STEPS,
            generator=generator,
            output_type="latent",
        ).images


def _drawn_weight(name: str, like: Tensor, generator: torch.Generator) -> Tensor:
    """Noise at which attention and modulation matter: outputs of order 1, scores with a spread of 2."""
    noise = torch.randn(like.shape, generator=generator)
    if like.ndim > 1:
        return (3.0 if ".to_v." in name else 1.0) * noise / math.sqrt(like.shape[1])
    return 1.4 + 0.1 * noise
