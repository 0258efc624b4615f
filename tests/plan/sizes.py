"""Sizes of models for plans, told by the models themselves."""

from typing import Any

from torch import nn

from clear_dist.families.flux.card import FluxShape
from clear_dist.plan import GPUS, LINKS, ModelSizes, PlanRequest, TextSizes, VaeSizes
from clear_dist.stages import Sampling, Upscaling

FLUX_SHAPE = FluxShape(guidance_embeds=True)
FLUX = ModelSizes(
    name="FLUX.1-dev",
    double_blocks=19,
    single_blocks=38,
    heads=24,
    head_dim=128,
    text_channels=4096,
    transformer=FLUX_SHAPE.tensors(),
    vae=VaeSizes(),
    text=TextSizes(),
)


def flux_request(**settings: Any) -> PlanRequest:
    """FLUX.1-dev at 8192 px with radius 16 on 8 H100s, but for `settings`."""
    defaults: dict[str, Any] = {
        "model": FLUX,
        "height": 8192,
        "width": 8192,
        "native": 1024,
        "sampling": Sampling(),
        "upscaling": Upscaling(),
        "window": 16,
        "ranks": 8,
        "gpu": GPUS["h100"],
        "link": LINKS["nvlink"],
    }
    return PlanRequest(**(defaults | settings))


def sizes_of(pipe: Any) -> ModelSizes:
    """Those of a tiny pipeline."""
    config, vae, t5 = pipe.transformer.config, pipe.vae.config, pipe.text_encoder_2.config
    return ModelSizes(
        name="tiny",
        double_blocks=config.num_layers,
        single_blocks=config.num_single_layers,
        heads=config.num_attention_heads,
        head_dim=config.attention_head_dim,
        text_channels=config.joint_attention_dim,
        transformer={name: tuple(x.shape) for name, x in pipe.transformer.state_dict().items()},
        vae=VaeSizes(
            channels=tuple(vae.block_out_channels),
            layers_per_block=vae.layers_per_block,
            latent_channels=vae.latent_channels,
            attention=vae.mid_block_add_attention,
            numbers=numbers(pipe.vae),
        ),
        text=TextSizes(
            numbers=numbers(pipe.text_encoder) + numbers(pipe.text_encoder_2),
            heads=t5.num_heads,
            channels=t5.d_model,
            hidden=t5.d_ff,
        ),
    )


def numbers(module: nn.Module) -> int:
    """Of its parameters."""
    return sum(x.numel() for x in module.parameters())
