"""SD3's pipelines: diffusers' own, on a transformer that is on stripes.

Latents are the VAE's own. Shapes: B pictures, T text tokens, C channels, R rows and W columns of latents.
"""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import StableDiffusion3Img2ImgPipeline, StableDiffusion3Pipeline
from torch import Tensor

from clear_dist.engine.family import Encoded
from clear_dist.engine.flow_match import FlowMatchAdapter, cut_off_by_t5_and_clip
from clear_dist.families.sd3.card import PACKING
from clear_dist.stages import Size, Stage


class SD3PipelineAdapter(FlowMatchAdapter):
    packing, stock, image_to_image = PACKING, StableDiffusion3Pipeline, StableDiffusion3Img2ImgPipeline
    arguments: tuple[str, ...] = (
        "prompt_embeds",
        "pooled_prompt_embeds",
        "negative_prompt_embeds",
        "negative_pooled_prompt_embeds",
    )

    @torch.no_grad()
    def encode(self, texts: list[str], max_sequence_length: int) -> Encoded:
        """CLIP's and T5's tokens [B, T, C], and CLIP's pooled [B, C]."""
        embeddings = self._pipe.encode_prompt(
            prompt=texts,
            prompt_2=None,
            prompt_3=None,
            do_classifier_free_guidance=False,
            max_sequence_length=max_sequence_length,
        )
        return [embeddings[0], embeddings[2]]

    def too_long(self, prompt: str, max_sequence_length: int) -> list[str]:
        return cut_off_by_t5_and_clip(self._pipe, self._pipe.tokenizer_3, prompt, max_sequence_length)

    def _guided(self, embeddings: Mapping[str, Tensor], stage: Stage) -> dict[str, Any]:
        """Guided where there are embeddings of a negative prompt."""
        is_guided = "negative_prompt_embeds" in embeddings
        return {**embeddings, "guidance_scale": stage.sampling.true_cfg_scale if is_guided else 1.0}

    def unpacked(self, latents: Tensor, rows: slice, size: Size) -> Tensor:
        start, stop, _ = rows.indices(latents.shape[2] // PACKING)
        return latents[:, :, PACKING * start : PACKING * stop]
