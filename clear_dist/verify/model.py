"""A tiny random FLUX, made here: N ranks against one and against stock diffusers, warm-up against the sync schedule."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from torch import Tensor

from clear_dist.comm.group import Group
from clear_dist.verify.dense import largest_error
from clear_dist.verify.finding import Finding, Subjects

SEED, STEPS = 0, 2
HEADS, HEAD_DIM, TEXT_WIDTH, POOLED_WIDTH, TEXT_TOKENS = 2, 16, 24, 16, 8
COLUMNS, LEAST_ROWS, RADIUS, PIXELS = 9, 13, 4, 16
TOLERANCE, BFLOAT16_TOLERANCE = 1e-4, 5e-2
"""bfloat16 rounds each of some hundred operations between input and output by up to 2^-9, and N ranks add up in another
order than one: on a CPU the largest difference was 0.5 to 0.9 per cent of the largest latent."""


def check(group: Group, subjects: Subjects) -> Iterator[Finding]:
    """Each comparison draws the same latents in two ways; every rank compares what it has at the end.

    The one rank that others are compared with computes with the reference backend.
    """
    rows = max(LEAST_ROWS, 2 * group.size + 1)
    ranks = f"{group.size} rank{'s' * (group.size > 1)}"
    pipe = make_pipeline(group.device, torch.float32)

    def stripes(**settings: Any) -> Tensor:
        # Not `auto`, which on a GPU compiles a kernel for each size of stripe and halo; see attention.py.
        return _on_stripes(pipe, rows, group, subjects, attention_backend="tiled", **settings)

    def finding(name: str, found: Tensor, expected: Tensor, tolerance: float) -> Finding:
        error = largest_error(found, expected)
        figure = f"{rows} x {COLUMNS} tokens, {STEPS} steps"
        fault = f"latents are off by {error:.2g} of the largest"
        return Finding(name=name, error=error, tolerance=tolerance, figure=figure, fault=fault)

    stock = _from_first(group, _draw(pipe, rows) if group.rank == 0 else None)
    yield finding(f"tiny FLUX, full attention, {ranks} against diffusers", stripes(window="full"), stock, TOLERANCE)
    alone = _drawn_alone(pipe, rows, group, subjects)
    exact = stripes(window=RADIUS, text_attention="exact")
    yield finding(f"tiny FLUX, exact, {ranks} against one, float32", exact, alone, TOLERANCE)
    warm_up = stripes(window=RADIUS, text_attention="exact", schedule="stale", warmup_steps=STEPS)
    yield finding("tiny FLUX, stale in warm-up against sync", warm_up, exact, 0.0)

    pipe = make_pipeline(group.device, torch.bfloat16)
    alone = _drawn_alone(pipe, rows, group, subjects)
    exact = stripes(window=RADIUS, text_attention="exact")
    yield finding(f"tiny FLUX, exact, {ranks} against one, bfloat16", exact, alone, BFLOAT16_TOLERANCE)


def make_pipeline(device: torch.device, dtype: torch.dtype) -> Any:
    """A FluxPipeline of a transformer and a scheduler only; equal weights in every process."""
    transformer = FluxTransformer2DModel(
        in_channels=64, num_layers=1, num_single_layers=1, num_attention_heads=HEADS, attention_head_dim=HEAD_DIM,
        axes_dims_rope=(4, 6, 6), joint_attention_dim=TEXT_WIDTH, pooled_projection_dim=POOLED_WIDTH,
        guidance_embeds=True,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(SEED)
    for name, parameter in transformer.named_parameters():
        parameter.data.copy_(_drawn_weight(name, parameter, generator))
    parts = dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    pipe = FluxPipeline(transformer=transformer.eval().to(device, dtype), scheduler=scheduler, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _drawn_weight(name: str, like: Tensor, generator: torch.Generator) -> Tensor:
    """At a scale at which attention and modulation matter: outputs of order 1, scores with a spread of about 2."""
    noise = torch.randn(like.shape, generator=generator)
    if like.ndim > 1:
        return (3.0 if ".to_v." in name else 1.0) * noise / math.sqrt(like.shape[1])
    if name.endswith("bias"):
        return 0.2 * noise
    return (1.4 if "norm_" in name else 1.0) + 0.1 * noise


def _draw(pipe: Any, rows: int) -> Tensor:
    """Packed latents [1, rows x columns, 64]."""
    generator = torch.Generator().manual_seed(SEED)
    device, dtype = pipe.transformer.device, pipe.transformer.dtype
    embeddings = torch.randn(1, TEXT_TOKENS, TEXT_WIDTH, generator=generator).to(device, dtype)
    pooled = torch.randn(1, POOLED_WIDTH, generator=generator).to(device, dtype)
    return pipe(
        prompt_embeds=embeddings,
        pooled_prompt_embeds=pooled,
        height=PIXELS * rows,
        width=PIXELS * COLUMNS,
        num_inference_steps=STEPS,
        generator=generator,
        output_type="latent",
    ).images


def _on_stripes(pipe: Any, rows: int, group: Group, subjects: Subjects, **settings: Any) -> Tensor:
    parallelized = subjects.parallelize(pipe, group=group, **settings)
    try:
        return _draw(pipe, rows)
    finally:
        parallelized.undo()


def _drawn_alone(pipe: Any, rows: int, group: Group, subjects: Subjects) -> Tensor:
    """What rank 0 computes by itself with the reference backend, on all ranks."""
    apart = group.split(1)
    drawn = None
    if group.rank == 0:
        settings = {"window": RADIUS, "text_attention": "exact", "attention_backend": "reference"}
        drawn = _on_stripes(pipe, rows, apart, subjects, **settings)
    latents = _from_first(group, drawn)
    apart.close()
    return latents


def _from_first(group: Group, latents: Tensor | None) -> Tensor:
    (theirs,) = group.broadcast_tensors([latents] if group.rank == 0 else None)
    assert theirs is not None, "rank 0 has drawn"
    return theirs
