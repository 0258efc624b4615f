"""One stage of denoising by diffusers' own pipelines, on a transformer that is on stripes."""

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxImg2ImgPipeline
from torch import Tensor

from clear_dist.stages import Stage, Upscaling

OnStep = Callable[[Any, Stage, int, Tensor], None]
"""Called after each step with pipeline and stage, the number of steps done and the latents [B, tokens, 64]."""


def denoise(
    pipe: Any,
    embeddings: dict[str, Tensor],
    stage: Stage,
    *,
    seed: int,
    start: Tensor | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """Latents [B, tokens, 64], equal on all ranks, as `FluxPipeline(output_type="latent")` returns them.

    Args:
        pipe: a pipeline for what the stage starts from, see `refining_pipeline`.
        embeddings: from `encode_prompts`.
        seed: of a CPU generator.
        start: latents [B, 16, height / 8, width / 8] of the picture that is to be refined; None: noise.

    Raises:
        RuntimeError: the latents are not finite (float16 that overflows, mostly): on all ranks, which hold the same.
    """
    sampling = stage.sampling

    def end_step(pipeline: Any, step: int, _: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if on_step is not None:
            on_step(pipeline, stage, step + 1, tensors["latents"])
        return {}

    latents = pipe(
        **embeddings,
        **({} if start is None else _refined_from(start, sampling)),
        height=stage.height,
        width=stage.width,
        num_inference_steps=sampling.steps,
        guidance_scale=sampling.guidance_scale,
        true_cfg_scale=sampling.true_cfg_scale,
        generator=torch.Generator().manual_seed(seed),
        output_type="latent",
        callback_on_step_end=end_step,
        callback_on_step_end_tensor_inputs=["latents"],
    ).images
    if not latents.isfinite().all():
        raise RuntimeError(f"the latents are not finite after {sampling.steps} steps in {latents.dtype}")
    return latents


def refining_pipeline(pipe: Any) -> FluxImg2ImgPipeline:
    """Image-to-image with the parts of `pipe`, and its scheduler's static shift (paper, Sec. 4.3).

    The dynamic shift grows with the size, until every step is taken in pure noise.

    Raises:
        ValueError: `pipe` has parts that image-to-image would leave out, such as a ControlNet.
    """
    parts = inspect.signature(FluxImg2ImgPipeline.__init__).parameters
    if other := [name for name in pipe.components if name not in parts]:
        raise ValueError(
            f"a cascade refines with FluxImg2ImgPipeline, which has no {', '.join(other)}, got {type(pipe).__name__}; "
            "nearest: a FluxPipeline of the same parts, or cascade=False"
        )
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config, use_dynamic_shifting=False)
    # Not `from_pipe`, which turns all parts, the given pipeline's too, to float32.
    refining = FluxImg2ImgPipeline(**{**pipe.components, "scheduler": scheduler})
    refining.set_progress_bar_config(**getattr(pipe, "_progress_bar_config", {}))
    return refining


def _refined_from(start: Tensor, sampling: Any) -> dict[str, Any]:
    assert isinstance(sampling, Upscaling), sampling
    # The sigmas that diffusers takes for num_inference_steps = steps / strength; so stated, every step counts.
    sigmas = np.linspace(sampling.strength, sampling.strength / sampling.steps, sampling.steps)
    return {"image": start, "strength": 1.0, "sigmas": sigmas.tolist()}
