"""SD3's pipelines: diffusers' own, on a transformer that is on stripes.

Latents are the VAE's own. Shapes: B pictures, T text tokens, C channels, R rows and W columns of latents.
"""

import inspect
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Img2ImgPipeline
from torch import Tensor

from clear_dist.engine.family import Encoded, OnStep
from clear_dist.families.sd3.card import PACKING
from clear_dist.options import shortened
from clear_dist.stages import Size, Stage, Upscaling


class SD3PipelineAdapter:
    arguments: tuple[str, ...] = (
        "prompt_embeds",
        "pooled_prompt_embeds",
        "negative_prompt_embeds",
        "negative_pooled_prompt_embeds",
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
        lines = []
        for name, tokenizer, most in (
            ("CLIP", self._pipe.tokenizer, self._pipe.tokenizer_max_length),
            ("T5", self._pipe.tokenizer_3, max_sequence_length),
        ):
            ids = tokenizer(prompt, truncation=False, verbose=False).input_ids
            if len(ids) > most:
                # The last place goes to the token that ends a prompt.
                rest = shortened(tokenizer.decode(ids[most - 1 :], skip_special_tokens=True).strip())
                lines.append(f"longer than the {most} tokens that {name} takes here; cut off: {rest!r}")
        return lines

    def refining(self) -> StableDiffusion3Img2ImgPipeline:
        """Image-to-image pipeline with the scheduler's static shift, whatever the size."""
        pipe = self._pipe
        parts = inspect.signature(StableDiffusion3Img2ImgPipeline.__init__).parameters
        if other := [name for name in pipe.components if name not in parts]:
            raise ValueError(
                f"a cascade refines with StableDiffusion3Img2ImgPipeline, which has no {', '.join(other)}, "
                f"got {type(pipe).__name__}; nearest: a StableDiffusion3Pipeline of the same parts, or cascade=False"
            )
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config, use_dynamic_shifting=False)
        # Not `from_pipe`, which turns all parts, the given pipeline's too, to float32.
        refining = StableDiffusion3Img2ImgPipeline(**{**pipe.components, "scheduler": scheduler})
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
        """Latents [B, C, H, W], guided where there are embeddings of a negative prompt."""
        sampling, refined = stage.sampling, {}
        if start is not None:
            assert isinstance(sampling, Upscaling), sampling
            # Levels of noise before the shift, from `strength` down, of which every step counts.
            sigmas = np.linspace(sampling.strength, sampling.strength / sampling.steps, sampling.steps)
            refined = {"image": start, "strength": 1.0, "sigmas": sigmas.tolist()}

        def end_step(pipeline: Any, step: int, _: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            if on_step is not None:
                on_step(pipeline, stage, step + 1, tensors["latents"])
            return {}

        latents = pipe(
            **embeddings,
            **refined,
            height=stage.height,
            width=stage.width,
            num_inference_steps=sampling.steps,
            guidance_scale=sampling.true_cfg_scale if "negative_prompt_embeds" in embeddings else 1.0,
            generator=torch.Generator().manual_seed(seed),
            output_type="latent",
            callback_on_step_end=end_step,
            callback_on_step_end_tensor_inputs=["latents"],
        ).images
        if not latents.isfinite().all():
            raise RuntimeError(f"the latents are not finite after {sampling.steps} steps in {latents.dtype}")
        return latents

    def unpacked(self, latents: Tensor, rows: slice, size: Size) -> Tensor:
        start, stop, _ = rows.indices(latents.shape[2] // PACKING)
        return latents[:, :, PACKING * start : PACKING * stop]

    def for_vae(self, latents_BCRW: Tensor) -> Tensor:
        config = self._pipe.vae.config
        return latents_BCRW / config.scaling_factor + config.shift_factor

    def from_vae(self, mean_BCHW: Tensor) -> Tensor:
        config = self._pipe.vae.config
        return (mean_BCHW - config.shift_factor) * config.scaling_factor
