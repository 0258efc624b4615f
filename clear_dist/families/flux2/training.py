"""FLUX.2 in training: a latent is a token; the single blocks are compared."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from clear_dist.engine.family import Inputs
from clear_dist.engine.references import raster_ids
from clear_dist.families.flux2.card import ROPE_AXES


@dataclass(frozen=True)
class Flux2Training:
    transformer: Any
    text_first = True
    compared = re.compile(r"single_transformer_blocks\.\d+\.attn")
    packing = 1

    def inputs(self, latents_BCHW: Tensor, sigmas_B: Tensor, embeddings: Sequence[Tensor], guidance: float) -> Inputs:
        (text,) = embeddings
        device, (batch, _, height, width) = latents_BCHW.device, latents_BCHW.shape
        axes = len(ROPE_AXES)
        text_ids = torch.zeros(text.shape[1], axes, device=device)
        text_ids[:, -1] = torch.arange(text.shape[1], device=device)
        given = {
            "hidden_states": latents_BCHW.flatten(2).transpose(1, 2),
            "encoder_hidden_states": text,
            "timestep": sigmas_B,
            "img_ids": raster_ids(height, width, device, axes=axes),
            "txt_ids": text_ids,
        }
        is_guided = self.transformer.config.guidance_embeds
        return given | ({"guidance": torch.full((batch,), guidance, device=device)} if is_guided else {})

    def velocity(self, output: tuple, like_BCHW: Tensor) -> Tensor:
        return output[0].transpose(1, 2).unflatten(2, like_BCHW.shape[2:])
