"""SD3 in training: latents as they are; the layers that see the text are compared."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from clear_dist.engine.family import Inputs
from clear_dist.families.sd3.card import PACKING

TIMESTEPS = 1000
"""Steps of the schedule that the model was trained with."""


@dataclass(frozen=True)
class SD3Training:
    transformer: Any
    text_first = False
    compared = re.compile(r"transformer_blocks\.\d+\.attn")
    packing = PACKING

    def inputs(self, latents_BCHW: Tensor, sigmas_B: Tensor, embeddings: Sequence[Tensor], guidance: float) -> Inputs:
        text, pooled = embeddings
        return {
            "hidden_states": latents_BCHW,
            "encoder_hidden_states": text,
            "pooled_projections": pooled,
            "timestep": TIMESTEPS * sigmas_B,
        }

    def velocity(self, output: tuple, like_BCHW: Tensor) -> Tensor:
        return output[0]
