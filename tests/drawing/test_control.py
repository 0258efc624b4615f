"""ControlNets in a cascade: N ranks against two calls of unmodified pipelines, with the paper's changes in both models."""

import math
from functools import cache
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FluxControlNetPipeline,
)
from diffusers.models.transformers.transformer_flux import FluxPosEmbed
from PIL import Image
from torch import Tensor

import clear_dist
from clear_dist.comm.group import Group
from clear_dist.drawing.cascade import SEED_STRIDE, Cascade
from clear_dist.drawing.given import controls_of
from clear_dist.drawing.prompts import encode_prompts
from clear_dist.engine.striped import require_striped
from clear_dist.families.transformers import adapter_of
from clear_dist.stages import Sampling, Stage, Upscaling, plan_cascade
from tests.oracle import DenseClearProcessor
from tests.ranks import run_ranks
from tests.tiny import make_tiny_pipeline
from tests.tiny_controlnet import make_tiny_controlnet

NATIVE, SEED, TEXT, RADIUS = 64, 11, 8, 3
UPSCALING = Upscaling(steps=2, strength=0.5)
SIZE = (112, 96)
STAGES = plan_cascade(SIZE, native=NATIVE, token=16, sampling=Sampling(steps=2), upscaling=UPSCALING)
PROMPTS = ["a hill", "a lake"]
CONTROL = Image.fromarray(np.random.default_rng(5).integers(0, 256, (76, 62, 3), dtype=np.uint8))

CASES: dict[str, dict[str, Any]] = {
    "union": {"nets": {"modes": 3}, "control_image": CONTROL, "controlnet_conditioning_scale": 0.7, "control_mode": 1},
    "pixels": {"nets": {"hint": True}, "control_image": CONTROL},
    "window": {"nets": {}, "control_image": CONTROL},
}


def relative_error(result: Tensor, expected: Tensor) -> float:
    return ((result - expected).norm() / expected.norm()).item()


def pipeline(case: str) -> Any:
    parts = make_tiny_pipeline(double_blocks=2, single_blocks=2, sample_size=NATIVE).components
    pipe = FluxControlNetPipeline(**parts, controlnet=make_tiny_controlnet(**CASES[case]["nets"]))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def arguments(case: str) -> dict[str, Any]:
    return {name: value for name, value in CASES[case].items() if name != "nets"}


def drawn(group: Group) -> dict[str, list[Tensor]]:
    """For each case, latents of the first stage, those that the second one starts from, and those of the second."""
    torch.use_deterministic_algorithms(True)
    return {case: drawn_alone(group, case) for case in CASES}


def drawn_alone(group: Group, case: str) -> list[Tensor]:
    pipe, given = pipeline(case), {"controlnet_conditioning_scale": 1.0, "control_mode": None} | arguments(case)
    window: Any = RADIUS if case == "window" else "full"
    clear_dist.parallelize(pipe, window=window, text_attention="exact", group=group)
    adapter, counters = adapter_of(pipe), require_striped(pipe).counters
    embeddings = encode_prompts(adapter, group, counters, PROMPTS, max_sequence_length=TEXT)
    names = "control_image", "controlnet_conditioning_scale", "control_mode"
    cascade = Cascade(pipe, embeddings, seed=SEED, controls=controls_of(pipe, *(given[name] for name in names)))
    with patch.object(type(adapter), "denoise", autospec=True, side_effect=type(adapter).denoise) as denoise:
        first, last = (stage.latents for stage in cascade.run(STAGES))
    assert first is not None and last is not None
    return [first, denoise.call_args.kwargs["start"], last]


@cache
def first_call(case: str) -> tuple[Tensor, Tensor]:
    """Latents of the first stage, and of the picture enlarged, all by diffusers alone."""
    pipe, (first, last) = pipeline(case), STAGES
    if case == "window":
        pipe.transformer.set_attn_processor(DenseClearProcessor(first.height // 16, first.width // 16, RADIUS))
    latents = called(pipe, case, first, SEED, guidance_scale=3.5)
    config = pipe.vae.config
    unpacked = pipe._unpack_latents(latents, *first.size, pipe.vae_scale_factor)
    decoded = pipe.vae.decode(unpacked / config.scaling_factor + config.shift_factor).sample
    pictures = pipe.image_processor.postprocess(decoded, output_type="pil")
    large = [picture.resize(last.size[::-1]) for picture in pictures]
    mean = pipe.vae.encode(pipe.image_processor.preprocess(large, *last.size)).latent_dist.mode()
    return latents, (mean - config.shift_factor) * config.scaling_factor


def second_call(case: str, start: Tensor) -> Tensor:
    """Latents of the second stage by diffusers alone, its pipeline given the noisy start."""
    pipe, last = pipeline(case), STAGES[1]
    if case == "window":
        pipe.transformer.set_attn_processor(DenseClearProcessor(last.height // 16, last.width // 16, RADIUS))
    with_paper_changes(pipe.transformer, last, TEXT)
    with_paper_changes(pipe.controlnet, last, TEXT + (case == "union"))  # whose mode is a token
    pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config, use_dynamic_shifting=False)
    seed = (SEED + SEED_STRIDE) % 2**63
    generator = torch.Generator().manual_seed(seed)
    for _ in range(1 if case == "pixels" else 2):  # the noise follows that of the control picture's encoder
        noise = torch.randn(start.shape, generator=generator)
    sigma = 3 * 0.5 / (1 + 2 * 0.5)  # half before the static shift of 3
    noisy = pipe._pack_latents(sigma * noise + (1 - sigma) * start, *start.shape)
    return called(pipe, case, last, seed, guidance_scale=7.5, latents=noisy, sigmas=[0.5, 0.25])


def called(pipe: Any, case: str, stage: Stage, seed: int, **rest: Any) -> Tensor:
    rest |= {"height": stage.height, "width": stage.width, "num_inference_steps": 2, **arguments(case)}
    generator = torch.Generator().manual_seed(seed)
    return pipe(PROMPTS, generator=generator, max_sequence_length=TEXT, output_type="latent", **rest).images


def with_paper_changes(model: Any, stage: Stage, text: int) -> None:
    """NTK factor 10, and scores scaled by log(n) / log(n0), through the weights that queries are linear in."""
    model.pos_embed = FluxPosEmbed(theta=100_000, axes_dim=model.config.axes_dims_rope)
    factor = math.sqrt(math.log(text + stage.height * stage.width // 256) / math.log(text + (NATIVE // 16) ** 2))
    for name, weight in model.named_parameters():
        if name.endswith(("norm_q.weight", "norm_added_q.weight")):
            weight.mul_(factor)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_two_stages_are_two_calls_of_stock_pipelines(size: int) -> None:
    """The ControlNet's attention is full, also where the transformer has a window."""
    first, *others = run_ranks(drawn, size)
    for case, (latents, start, refined) in first.items():
        assert all(all(map(torch.equal, each[case], first[case])) for each in others), case
        expected, large = first_call(case)
        assert relative_error(latents, expected) < 1e-4, case
        assert relative_error(start, large) < 0.005, case  # through bytes, of which a few are another one
        assert relative_error(refined, second_call(case, start)) < 1e-4, case
