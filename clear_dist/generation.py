"""From a prompt to a picture with a parallelized pipeline: encode on rank 0, denoise and decode on stripes."""

from collections.abc import Callable
from typing import Any

import torch
from PIL.Image import Image, fromarray
from torch import Tensor

from clear_dist.comm.stripe_collect import collect_stripes
from clear_dist.geometry import cut_in_stripes
from clear_dist.parallelize import require_striped
from clear_dist.text import encode_prompts
from clear_dist.vae import decode_stripes

PACKING = 2
"""FLUX packs 2x2 latents in a token."""


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
    height, width = (pipe.vae.config.sample_size if size is None else size for size in (height, width))
    require_whole_tokens(pipe, height=height, width=width)
    prompts = [prompt] if isinstance(prompt, str) else prompt
    if not prompts:
        raise ValueError("prompt must be a text or a list of at least one, got an empty list")
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
    on_step: Callable[[int], None] | None = None,
) -> Tensor:
    """Latents [B, tokens, 64], equal on all ranks, as `FluxPipeline(output_type="latent")` returns them.

    Args:
        embeddings: from `encode_prompts`.
        height, width: pixels.
        on_step: called after each step with the number of steps done.

    Raises:
        ValueError: a size is no multiple of the token size.
        RuntimeError: the latents are not finite (float16 that overflows, mostly): on all ranks, which hold the same.
    """
    require_whole_tokens(pipe, height=height, width=width)

    def end_step(_: Any, step: int, __: Any, ___: dict[str, Any]) -> dict[str, Any]:
        if on_step is not None:
            on_step(step + 1)
        return {}

    latents = pipe(
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
    if not latents.isfinite().all():
        raise RuntimeError(f"the latents are not finite after {num_inference_steps} steps in {latents.dtype}")
    return latents


def require_whole_tokens(pipe: Any, **sizes: int) -> None:
    """Raises ValueError where a size in pixels is no multiple of the token size."""
    token = token_size(pipe)
    for name, size in sizes.items():
        if size < token or size % token:
            nearest = max(token, round(size / token) * token)
            raise ValueError(f"{name} must be a multiple of {token} pixels, got {size}; nearest: {nearest}")


@torch.no_grad()
def decode(pipe: Any, latents: Tensor, *, height: int, width: int) -> list[Image]:
    """Pictures of packed latents [B, tokens, 64], on rank 0; elsewhere an empty list. Each rank decodes its stripe."""
    group = require_striped(pipe).group
    stripes = cut_in_stripes(height // token_size(pipe), group.size)
    unpacked_BCHW = pipe._unpack_latents(latents, height, width, pipe.vae_scale_factor)
    mine = stripes[group.rank]
    rows = slice(PACKING * mine.start, PACKING * mine.stop)
    scaled = unpacked_BCHW[:, :, rows] / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor
    pixels_BCRW = decode_stripes(pipe.vae, scaled.to(pipe.vae.dtype), group, stripes)
    bytes_RBWC = (pixels_BCRW.float() / 2 + 0.5).clamp(0, 1).mul(255).round().to(torch.uint8).permute(2, 0, 3, 1)
    heights = tuple(len(stripe) * token_size(pipe) for stripe in stripes)
    collected = list(collect_stripes(bytes_RBWC, group, heights))
    if not collected:
        return []
    return [fromarray(picture.numpy()) for picture in torch.cat(collected).unbind(dim=1)]


def token_size(pipe: Any) -> int:
    """Pixels along the side of a token."""
    return pipe.vae_scale_factor * PACKING
