"""Tiny random FLUX.2 pipelines of true architecture, made in a second or two, with all their parts."""

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
)
from transformers import Mistral3Config, Mistral3ForConditionalGeneration

from tests.families.tiny import make_qwen3, make_qwen_tokenizer, save_pipeline
from tests.tiny import draw_weights

TEXT_WIDTH = 8
"""Channels of the text encoder; three of its layers are 24 channels of a text token."""
OF_PARTS = (
    "{% for message in messages %}<|im_start|>{% for part in message['content'] %}{{ part['text'] }}{% endfor %}"
    "<|im_end|>{% endfor %}"
)
"""Messages that are lists of words and pictures."""
TEXT_LAYERS = 27
"""The pipeline takes the outputs of the 9th, 18th and 27th."""


def make_tiny_transformer(*, guidance: bool = False, double: int = 1, single: int = 2) -> Flux2Transformer2DModel:
    return Flux2Transformer2DModel(
        in_channels=128,
        num_layers=double,
        num_single_layers=single,
        num_attention_heads=2,
        attention_head_dim=16,
        axes_dims_rope=(4, 4, 4, 4),
        joint_attention_dim=3 * TEXT_WIDTH,
        guidance_embeds=guidance,
    )


def make_tiny_vae(*, sample_size: int = 128, attention: bool = True) -> AutoencoderKLFlux2:
    return AutoencoderKLFlux2(
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        latent_channels=32,
        norm_num_groups=4,
        sample_size=sample_size,
        mid_block_add_attention=attention,
    )


def make_tiny_klein(*, seed: int = 0, is_distilled: bool = True, sample_size: int = 128) -> Flux2KleinPipeline:
    """On the CPU in float32; equal seeds give equal weights, in every process."""
    generator = torch.Generator().manual_seed(seed)
    tokenizer = make_qwen_tokenizer()
    return Flux2KleinPipeline(
        transformer=draw_weights(make_tiny_transformer(), generator),
        vae=draw_statistics(draw_weights(make_tiny_vae(sample_size=sample_size), generator), generator),
        text_encoder=draw_weights(make_qwen3(tokenizer, width=TEXT_WIDTH, layers=TEXT_LAYERS, causal=True), generator),
        tokenizer=tokenizer,
        scheduler=make_scheduler(),
        is_distilled=is_distilled,
    )


def make_tiny_dev(*, seed: int = 0) -> Flux2Pipeline:
    """With a tokenizer in the place of Mistral's processor for words and pictures, which needs torchvision."""
    generator = torch.Generator().manual_seed(seed)
    tokenizer = make_qwen_tokenizer()
    tokenizer.chat_template = OF_PARTS
    return Flux2Pipeline(
        transformer=draw_weights(make_tiny_transformer(guidance=True), generator),
        vae=draw_statistics(draw_weights(make_tiny_vae(), generator), generator),
        text_encoder=draw_weights(make_mistral3(len(tokenizer)), generator),
        tokenizer=tokenizer,
        scheduler=make_scheduler(),
    )


def make_mistral3(vocabulary: int) -> Mistral3ForConditionalGeneration:
    """Sees words, and pictures, by 30 layers; the pipeline takes the outputs of three."""
    small = {"hidden_size": TEXT_WIDTH, "intermediate_size": 16, "num_attention_heads": 2}
    text = {**small, "model_type": "mistral", "num_hidden_layers": 30, "num_key_value_heads": 1, "head_dim": 8}
    sight = {**small, "model_type": "pixtral", "num_hidden_layers": 1, "head_dim": 4, "image_size": 28}
    config = Mistral3Config(text_config={**text, "vocab_size": vocabulary}, vision_config={**sight, "patch_size": 14})
    return Mistral3ForConditionalGeneration(config)


def make_tiny_folder(folder: Path | str, **options: Any) -> Path:
    return save_pipeline(make_tiny_klein(**options), folder)


def make_scheduler() -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)


def draw_statistics(vae: AutoencoderKLFlux2, generator: torch.Generator) -> AutoencoderKLFlux2:
    """Means and variances of latents that are neither 0 nor 1."""
    vae.bn.running_mean.copy_(0.3 * torch.randn(vae.bn.running_mean.shape, generator=generator))
    vae.bn.running_var.copy_(0.5 + torch.rand(vae.bn.running_var.shape, generator=generator))
    return vae
