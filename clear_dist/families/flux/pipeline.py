"""FLUX's pipelines: diffusers' own, on a transformer that is on stripes.

Latents are packed: 2x2 of the VAE's are the 64 channels of a token. Shapes: B pictures, T text tokens, C channels,
R rows and W columns in the VAE's layout.
"""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import FluxImg2ImgPipeline, FluxPipeline
from torch import Tensor

from clear_dist.engine.family import Encoded
from clear_dist.engine.flow_match import FlowMatchAdapter, cut_off_by_t5_and_clip
from clear_dist.families.flux.card import PACKING, YARN_NATIVE_TOKENS, is_yarn
from clear_dist.stages import Size, Stage


class FluxPipelineAdapter(FlowMatchAdapter):
    packing, stock, image_to_image = PACKING, FluxPipeline, FluxImg2ImgPipeline
    arguments: tuple[str, ...] = (
        "prompt_embeds",
        "pooled_prompt_embeds",
        "negative_prompt_embeds",
        "negative_pooled_prompt_embeds",
    )

    @property
    def has_yarn(self) -> bool:
        return is_yarn(self._pipe.transformer.config)

    @property
    def native_size(self) -> int:
        return YARN_NATIVE_TOKENS * self.token_size if self.has_yarn else super().native_size

    @torch.no_grad()
    def encode(self, texts: list[str], max_sequence_length: int) -> Encoded:
        """T5's [B, T, C] and CLIP's [B, C]."""
        embeddings = self._pipe.encode_prompt(prompt=texts, prompt_2=None, max_sequence_length=max_sequence_length)
        return list(embeddings[:2])

    def too_long(self, prompt: str, max_sequence_length: int) -> list[str]:
        return cut_off_by_t5_and_clip(self._pipe, self._pipe.tokenizer_2, prompt, max_sequence_length)

    def _guided(self, embeddings: Mapping[str, Tensor], stage: Stage) -> dict[str, Any]:
        sampling = stage.sampling
        return {**embeddings, "guidance_scale": sampling.guidance_scale, "true_cfg_scale": sampling.true_cfg_scale}

    def unpacked(self, latents: Tensor, rows: slice, size: Size) -> Tensor:
        width = size[1] // self.token_size
        return self.spread(latents.unflatten(1, (-1, width))[:, rows].flatten(1, 2), size)

    def spread(self, latents: Tensor, size: Size) -> Tensor:
        width = size[1] // self.token_size
        height = latents.shape[1] // width * self.token_size
        return self._pipe._unpack_latents(latents, height, size[1], self._pipe.vae_scale_factor)

    def packed(self, latents_BCHW: Tensor) -> Tensor:
        return self._pipe._pack_latents(latents_BCHW, *latents_BCHW.shape)
