"""Z-Image's pipelines: diffusers' own, on a transformer that is on stripes.

Latents are the VAE's, float32 [B, C, H, W]. Shapes: B pictures, T text tokens, C channels, R rows and W columns.
"""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, ZImageImg2ImgPipeline
from diffusers.image_processor import VaeImageProcessor
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from clear_dist.engine.family import Encoded, OnStep
from clear_dist.families.z_image.card import PACKING
from clear_dist.options import shortened
from clear_dist.stages import Size, Stage, Upscaling


class ZImagePipelineAdapter:
    arguments: tuple[str, ...] = (
        "prompt_embeds",
        "prompt_lengths",
        "negative_prompt_embeds",
        "negative_prompt_lengths",
    )

    def __init__(self, pipe: Any) -> None:
        self._pipe = pipe

    @property
    def token_size(self) -> int:
        return self._pipe.vae_scale_factor * PACKING

    @property
    def native_size(self) -> int:
        return self._pipe.vae.config.sample_size

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
        if len(ids) <= max_sequence_length:
            return []
        rest = shortened(tokenizer.decode(ids[max_sequence_length:], skip_special_tokens=True).strip())
        return [f"longer than the {max_sequence_length} tokens that Qwen3 takes here; cut off: {rest!r}"]

    def refining(self) -> ZImageImg2ImgPipeline:
        """Image-to-image pipeline with the scheduler's static shift (paper, Sec. 4.3), which Z-Image has anyway."""
        pipe = self._pipe
        parts = inspect.signature(ZImageImg2ImgPipeline.__init__).parameters
        if other := [name for name in pipe.components if name not in parts]:
            raise ValueError(
                f"a cascade refines with ZImageImg2ImgPipeline, which has no {', '.join(other)}, "
                f"got {type(pipe).__name__}; nearest: a ZImagePipeline of the same parts, or cascade=False"
            )
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config, use_dynamic_shifting=False)
        # Not `from_pipe`, which turns all parts, the given pipeline's too, to float32.
        refining = ZImageImg2ImgPipeline(**{**pipe.components, "scheduler": scheduler})
        # The stock one takes latents for a picture.
        channels = pipe.vae.config.latent_channels
        refining.image_processor = VaeImageProcessor(vae_scale_factor=self.token_size, vae_latent_channels=channels)
        refining.set_progress_bar_config(**getattr(pipe, "_progress_bar_config", {}))
        return refining

    def denoise(
        self,
        pipe: Any,
        embeddings: Mapping[str, Tensor],
        stage: Stage,
        *,
        seed: int,
        start: Tensor | None = None,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """Latents [B, C, H, W], as from `ZImagePipeline(output_type="latent")`; `true_cfg_scale` is its guidance."""
        sampling, refined = stage.sampling, {}
        if start is not None:
            assert isinstance(sampling, Upscaling), sampling
            # diffusers' sigmas for num_inference_steps = steps / strength; stated like this, every step counts.
            sigmas = torch.linspace(sampling.strength, sampling.strength / sampling.steps, sampling.steps)
            refined = {"image": start, "strength": 1.0, "sigmas": sigmas.tolist()}

        def end_step(pipeline: Any, step: int, _: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            if on_step is not None:
                on_step(pipeline, stage, step + 1, tensors["latents"])
            return {}

        negative = captions(embeddings, "negative_prompt")
        latents = pipe(
            prompt_embeds=captions(embeddings, "prompt"),
            negative_prompt_embeds=negative,
            **refined,
            height=stage.height,
            width=stage.width,
            num_inference_steps=sampling.steps,
            guidance_scale=sampling.true_cfg_scale if negative and sampling.true_cfg_scale > 1 else 0.0,
            generator=torch.Generator().manual_seed(seed),
            output_type="latent",
            callback_on_step_end=end_step,
            callback_on_step_end_tensor_inputs=["latents"],
        ).images
        if not latents.isfinite().all():
            raise RuntimeError(f"the latents are not finite after {sampling.steps} steps in {pipe.transformer.dtype}")
        return latents

    def unpacked(self, latents: Tensor, rows: slice, size: Size) -> Tensor:
        return latents.unflatten(2, (-1, PACKING))[:, :, rows].flatten(2, 3)

    def for_vae(self, latents_BCRW: Tensor) -> Tensor:
        config = self._pipe.vae.config
        return latents_BCRW / config.scaling_factor + config.shift_factor

    def from_vae(self, mean_BCHW: Tensor) -> Tensor:
        config = self._pipe.vae.config
        return (mean_BCHW - config.shift_factor) * config.scaling_factor


def captions(embeddings: Mapping[str, Tensor], kind: str) -> list[Tensor] | None:
    """Each caption [T, C] as long as it is; None where there are none."""
    if f"{kind}_embeds" not in embeddings:
        return None
    padded, lengths = embeddings[f"{kind}_embeds"], embeddings[f"{kind}_lengths"].tolist()
    return [each[:length] for each, length in zip(padded, lengths, strict=True)]
