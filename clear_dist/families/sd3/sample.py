"""A tiny random SD3 for `clear-dist verify` to draw with, on one rank and on many."""

import math
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import Tensor

SEED, STEPS, PIXELS = 0, 2, 16
HEADS, HEAD_DIM, TEXT_WIDTH, POOLED_WIDTH, TEXT_TOKENS = 2, 16, 24, 16, 8


class SD3Sample:
    name = "SD3"
    steps = STEPS
    text_shape: tuple[int, ...] = (2, 333, 38, 64)

    def pipeline(self, device: torch.device, dtype: torch.dtype) -> Any:
        transformer = SD3Transformer2DModel(
            sample_size=32, num_layers=2, num_attention_heads=HEADS, attention_head_dim=HEAD_DIM,
            joint_attention_dim=TEXT_WIDTH, caption_projection_dim=HEADS * HEAD_DIM, pooled_projection_dim=POOLED_WIDTH,
            pos_embed_max_size=256, dual_attention_layers=(0,), qk_norm="rms_norm",
        )  # fmt: skip
        generator = torch.Generator().manual_seed(SEED)
        for name, parameter in transformer.named_parameters():
            parameter.data.copy_(_drawn_weight(name, parameter, generator))
        parts = dict.fromkeys(
            ("vae", *(f"{part}{n}" for part in ("text_encoder", "tokenizer") for n in ("", "_2", "_3")))
        )
        scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
        torch.nn.Module.to(transformer, device, dtype)  # diffusers' own warns where there is nothing to warn of
        pipe = StableDiffusion3Pipeline(transformer=transformer.eval(), scheduler=scheduler, **parts)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def draw(self, pipe: Any, grid: tuple[int, int]) -> Tensor:
        """Latents [1, 16, 2 x height, 2 x width], with guidance."""
        generator = torch.Generator().manual_seed(SEED)
        device, dtype = pipe.transformer.device, pipe.transformer.dtype
        shapes = ((1, TEXT_TOKENS, TEXT_WIDTH), (1, POOLED_WIDTH)) * 2
        text, pooled, other, other_pooled = (torch.randn(x, generator=generator).to(device, dtype) for x in shapes)
        return pipe(
            prompt_embeds=text,
            pooled_prompt_embeds=pooled,
            negative_prompt_embeds=other,
            negative_pooled_prompt_embeds=other_pooled,
            height=PIXELS * grid[0],
            width=PIXELS * grid[1],
            num_inference_steps=STEPS,
            guidance_scale=4.0,
            generator=generator,
            output_type="latent",
        ).images


def _drawn_weight(name: str, like: Tensor, generator: torch.Generator) -> Tensor:
    """Noise at which attention and modulation matter: outputs of order 1, scores with a spread of 2."""
    noise = torch.randn(like.shape, generator=generator)
    if like.ndim > 1:
        return (3.0 if ".to_v." in name else 1.0) * noise / math.sqrt(like[0].numel())
    if name.endswith("bias"):
        return 0.2 * noise
    return (1.4 if "norm_" in name else 1.0) + 0.1 * noise
