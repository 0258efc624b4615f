"""From a prompt to a picture with a parallelized pipeline: encode on rank 0, denoise on stripes, decode on rank 0."""

from collections.abc import Callable
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from clear_dist.parallelize import require_striped
from clear_dist.text import encode_prompts


def generate(
    pipe: Any,
    prompt: str | list[str],
    *,
    height: int | None = None,
    width: int | None = None,
    num_inference_steps: int = 28,
    guidance_scale: float = 3.5,
    negative_prompt: str | None = None,
    true_cfg_scale: float = 1.0,
    max_sequence_length: int = 512,
    num_images: int = 1,
    seed: int = 0,
) -> list[Image]:
    """Pictures of `prompt`, on rank 0; the other ranks take part and get an empty list.

    Args:
        pipe: a pipeline that `parallelize` was called on; only rank 0 needs its text encoders.
        height, width: pixels, multiples of the token size; the model's native size by default.
        seed: of a CPU generator, so that it means the same noise as in `FluxPipeline` and on any number of ranks.

    Raises:
        ValueError: the pipeline is not parallelized, or a size is no multiple of the token size.
    """
    striped = require_striped(pipe)
    height, width = (size or pipe.vae.config.sample_size for size in (height, width))
    prompts = [prompt] if isinstance(prompt, str) else prompt
    embeddings = encode_prompts(
        pipe,
        striped.group,
        striped.counters,
        prompts,
        negative_prompts=None if negative_prompt is None else [negative_prompt] * len(prompts),
        max_sequence_length=max_sequence_length,
        num_images=num_images,
    )
    latents = denoise(
        pipe,
        embeddings,
        height=height,
        width=width,
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        true_cfg_scale=true_cfg_scale,
        seed=seed,
    )
    return decode(pipe, latents, height=height, width=width)


def denoise(
    pipe: Any,
    embeddings: dict[str, Tensor],
    *,
    height: int,
    width: int,
    num_inference_steps: int,
    guidance_scale: float,
    true_cfg_scale: float,
    seed: int,
    on_step: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Latents [B, tokens, 64], equal on all ranks, as `FluxPipeline(output_type="latent")` returns them.

    Args:
        embeddings: from `encode_prompts`.
        height, width: pixels.
        on_step: called after each step with the steps done and their total.

    Raises:
        ValueError: a size is no multiple of the token size.
    """
    token = pipe.vae_scale_factor * 2
    for name, size in (("height", height), ("width", width)):
        if size < token or size % token:
            nearest = max(token, round(size / token) * token)
            raise ValueError(f"{name} must be a multiple of {token} pixels, got {size}; nearest: {nearest}")

    def end_step(_: Any, step: int, __: Any, ___: dict[str, Any]) -> dict[str, Any]:
        if on_step is not None:
            on_step(step + 1, num_inference_steps)
        return {}

    return pipe(
        **embeddings,
        height=height,
        width=width,
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        true_cfg_scale=true_cfg_scale,
        generator=torch.Generator().manual_seed(seed),
        output_type="latent",
        callback_on_step_end=end_step,
        callback_on_step_end_tensor_inputs=[],
    ).images


@torch.no_grad()
def decode(pipe: Any, latents: Tensor, *, height: int, width: int) -> list[Image]:
    """Pictures of packed latents [B, tokens, 64], on rank 0; elsewhere an empty list."""
    if require_striped(pipe).group.rank != 0:
        return []
    unpacked = pipe._unpack_latents(latents, height, width, pipe.vae_scale_factor)
    unpacked = unpacked / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor
    pixels = pipe.vae.decode(unpacked.to(pipe.vae.dtype), return_dict=False)[0]
    return pipe.image_processor.postprocess(pixels, output_type="pil")
