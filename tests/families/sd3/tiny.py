"""A tiny random SD3 of each kind, made in a second or two: true classes and geometry, 16 pixels a token."""

from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)

from tests.families.tiny import make_projected_clip, save_pipeline
from tests.tiny import draw_weights, make_clip_tokenizer, make_t5, make_t5_tokenizer, make_vae

TEXT_WIDTH = 40
"""T5's; the two CLIPs' together are narrower, and padded."""
CLIP_WIDTHS, POOLED_WIDTHS = (16, 20), (16, 24)
HEADS, HEAD_DIM, LAYERS = 2, 16, 3
TABLE = 24
"""Rows of the table of positions."""

Kind = Literal["large", "medium", "3"]
KINDS: dict[Kind, dict[str, Any]] = {
    "large": {"qk_norm": "rms_norm"},
    "medium": {"qk_norm": "rms_norm", "dual_attention_layers": (0, 1)},
    "3": {},
}


def make_tiny_transformer(kind: Kind = "large", *, seed: int = 0, **config: Any) -> SD3Transformer2DModel:
    transformer = SD3Transformer2DModel(
        **{
            "sample_size": 16,  # the native size, in latents
            "num_layers": LAYERS,
            "attention_head_dim": HEAD_DIM,
            "num_attention_heads": HEADS,
            "joint_attention_dim": TEXT_WIDTH,
            "caption_projection_dim": HEADS * HEAD_DIM,
            "pooled_projection_dim": sum(POOLED_WIDTHS),
            "pos_embed_max_size": TABLE,
        }
        | KINDS[kind]
        | config
    )
    return draw_weights(transformer, torch.Generator().manual_seed(seed))


def make_tiny_pipeline(kind: Kind = "large", *, seed: int = 0, **config: Any) -> StableDiffusion3Pipeline:
    """On the CPU in float32; equal seeds give equal weights, in every process."""
    generator = torch.Generator().manual_seed(seed + 1)
    tokenizer, tokenizer_3 = make_clip_tokenizer(), make_t5_tokenizer()
    clips = [
        draw_weights(make_projected_clip(tokenizer, width=width, pooled=pooled), generator)
        for width, pooled in zip(CLIP_WIDTHS, POOLED_WIDTHS, strict=True)
    ]
    vae: AutoencoderKL = draw_weights(make_vae(128), generator)
    pipe = StableDiffusion3Pipeline(
        transformer=make_tiny_transformer(kind, seed=seed, **config),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=clips[0],
        text_encoder_2=clips[1],
        text_encoder_3=draw_weights(make_t5(len(tokenizer_3), TEXT_WIDTH), generator),
        tokenizer=tokenizer,
        tokenizer_2=make_clip_tokenizer(),
        tokenizer_3=tokenizer_3,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make_tiny_sd3(folder: Path | str, kind: Kind = "large", **options: Any) -> Path:
    """Save a tiny pipeline in diffusers' layout and return its folder. Options as `make_tiny_pipeline`."""
    return save_pipeline(make_tiny_pipeline(kind, **options), folder)
