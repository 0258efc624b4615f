"""Z-Image's pipelines: diffusers' own, on a transformer that is on stripes.

Latents are the VAE's, float32 [B, C, H, W]. Shapes: B pictures, T text tokens, C channels, R rows and W columns.
"""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import ZImageImg2ImgPipeline, ZImagePipeline
from diffusers.image_processor import VaeImageProcessor
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from clear_dist.engine.family import Encoded
from clear_dist.engine.flow_match import FlowMatchAdapter, cut_off
from clear_dist.engine.refiner import Below
from clear_dist.families.z_image.card import PACKING
from clear_dist.stages import Size, Stage


class ZImagePipelineAdapter(FlowMatchAdapter):
    packing, stock, image_to_image = PACKING, ZImagePipeline, ZImageImg2ImgPipeline
    arguments: tuple[str, ...] = (
        "prompt_embeds",
        "prompt_lengths",
        "negative_prompt_embeds",
        "negative_prompt_lengths",
    )

    @torch.no_grad()
    def encode(self, texts: list[str], max_sequence_length: int) -> Encoded:
        """Qwen3's [B, T, C], and the length [B] of each: the rest is padding, which the pipeline leaves out."""
        embeddings, _ = self._pipe.encode_prompt(
            list(texts), do_classifier_free_guidance=False, max_sequence_length=max_sequence_length
        )
        lengths = torch.tensor([len(each) for each in embeddings])
        return [pad_sequence(embeddings, batch_first=True), lengths]

    def too_long(self, prompt: str, max_sequence_length: int) -> list[str]:
        tokenizer, message = self._pipe.tokenizer, [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True, enable_thinking=True)
        ids = tokenizer(text, truncation=False, verbose=False).input_ids
        return cut_off("Qwen3", tokenizer, ids, max_sequence_length)

    def refining(self, stage: Stage, below: Below | None = None) -> Any:
        """As of all families, but that diffusers' own takes latents for a picture."""
        refining, channels = super().refining(stage, below), self._pipe.vae.config.latent_channels
        refining.image_processor = VaeImageProcessor(vae_scale_factor=self.token_size, vae_latent_channels=channels)
        return refining

    def _guided(self, embeddings: Mapping[str, Tensor], stage: Stage) -> dict[str, Any]:
        """`true_cfg_scale` is the pipeline's guidance."""
        negative, scale = captions(embeddings, "negative_prompt"), stage.sampling.true_cfg_scale
        return {
            "prompt_embeds": captions(embeddings, "prompt"),
            "negative_prompt_embeds": negative,
            "guidance_scale": scale if negative and scale > 1 else 0.0,
        }

    def unpacked(self, latents: Tensor, rows: slice, size: Size) -> Tensor:
        return latents.unflatten(2, (-1, PACKING))[:, :, rows].flatten(2, 3)


def captions(embeddings: Mapping[str, Tensor], kind: str) -> list[Tensor] | None:
    """Each caption [T, C] as long as it is; None where there are none."""
    if f"{kind}_embeds" not in embeddings:
        return None
    padded, lengths = embeddings[f"{kind}_embeds"], embeddings[f"{kind}_lengths"].tolist()
    return [each[:length] for each, length in zip(padded, lengths, strict=True)]
