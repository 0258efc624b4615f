"""FLUX in training: packed latents, distilled guidance, and the single blocks compared, as CLEAR's own code does."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import FluxPipeline
from torch import Tensor

from clear_dist.engine.family import Inputs
from clear_dist.engine.references import raster_ids
from clear_dist.families.flux.card import PACKING


@dataclass(frozen=True)
class FluxTraining:
    transformer: Any
    text_first = True
    compared = re.compile(r"single_transformer_blocks\.\d+\.attn")
    packing = PACKING

    def inputs(self, latents_BCHW: Tensor, sigmas_B: Tensor, embeddings: Sequence[Tensor], guidance: float) -> Inputs:
        text, pooled = embeddings
        device, (batch, channels, height, width) = latents_BCHW.device, latents_BCHW.shape
        given = {
            "hidden_states": FluxPipeline._pack_latents(latents_BCHW, batch, channels, height, width),
            "encoder_hidden_states": text,
            "pooled_projections": pooled,
            "timestep": sigmas_B,
            "img_ids": raster_ids(height // PACKING, width // PACKING, device),
            "txt_ids": torch.zeros(text.shape[1], 3, device=device),
        }
        is_guided = self.transformer.config.guidance_embeds
        return given | ({"guidance": torch.full((batch,), guidance, device=device)} if is_guided else {})

    def velocity(self, output: tuple, like_BCHW: Tensor) -> Tensor:
        height, width = like_BCHW.shape[2:]
        return FluxPipeline._unpack_latents(output[0], height, width, vae_scale_factor=1)
