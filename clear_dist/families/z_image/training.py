"""Z-Image in training: times run from noise to picture, and so does its velocity; captions are as long as they are."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from clear_dist.engine.family import Inputs
from clear_dist.families.z_image.card import PACKING


@dataclass(frozen=True)
class ZImageTraining:
    transformer: Any
    text_first = False
    compared = re.compile(r"layers\.\d+\.attention")
    packing = PACKING

    def inputs(self, latents_BCHW: Tensor, sigmas_B: Tensor, embeddings: Sequence[Tensor], guidance: float) -> Inputs:
        padded, lengths = embeddings
        captions = [each[:length] for each, length in zip(padded, lengths.tolist(), strict=True)]
        return {"x": list(latents_BCHW.unsqueeze(2).unbind()), "t": 1 - sigmas_B, "cap_feats": captions}

    def velocity(self, output: tuple, like_BCHW: Tensor) -> Tensor:
        return -torch.stack(list(output[0])).squeeze(2)
