"""Stages of a cascade on N ranks: against unmodified diffusers, stage by stage, and against one rank."""

import math
from dataclasses import replace
from functools import cache
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxImg2ImgPipeline, FluxPipeline
from diffusers.models.transformers.transformer_flux import FluxPosEmbed
from PIL import Image
from torch import Tensor

import clear_dist
from clear_dist.comm.group import Group
from clear_dist.demo import WEIGHTS
from clear_dist.drawing.cascade import SEED_STRIDE, Cascade
from clear_dist.drawing.drawn import Drawing
from clear_dist.drawing.given import from_image
from clear_dist.drawing.prompts import encode_prompts
from clear_dist.engine.striped import require_striped
from clear_dist.families.transformers import adapter_of
from clear_dist.stages import Sampling, Size, Stage, Upscaling, plan_cascade, plan_upscaling
from tests.ranks import run_ranks
from tests.tiny import make_tiny_pipeline

NATIVE, SEED, TEXT = 64, 11, 8
SAMPLING = Sampling(steps=2)
UPSCALING = Upscaling(steps=2, strength=0.5, ntk_factor=10.0)
SIZE = (192, 160)
STAGES = plan_cascade(SIZE, native=NATIVE, token=16, sampling=SAMPLING, upscaling=UPSCALING)
PROMPTS = ["a hill", "a lake"]
ROUNDED = 5e-4
"""Error from bytes between stages: a value near the middle of two may become either."""
PICTURE = np.random.default_rng(5).integers(0, 256, (76, 62, 3), dtype=np.uint8)


def relative_error(result: Tensor, expected: Tensor) -> float:
    return ((result - expected).norm() / expected.norm()).item()


def drawn(group: Group, stages: tuple[Stage, ...], from_picture: bool, **arguments: Any) -> dict[str, Any]:
    """What one rank has after the last stage, and how much it counted."""
    pipe = make_tiny_pipeline(sample_size=NATIVE)
    pipe.set_progress_bar_config(disable=True)
    parallelized = clear_dist.parallelize(pipe, group=group, **arguments)
    counters = require_striped(pipe).counters
    prompts = PROMPTS[:1] if from_picture else PROMPTS
    embeddings = encode_prompts(adapter_of(pipe), group, counters, prompts, max_sequence_length=TEXT)
    cascade = Cascade(pipe, embeddings, seed=SEED)
    drawing: Drawing | None = from_image(Image.fromarray(PICTURE), group) if from_picture else None
    for stage in stages:
        drawing = cascade.draw(stage, drawing)
    assert drawing is not None and drawing.pixels is not None
    steps = {name: len(values) for name, values in counters.as_dict().items()}
    theta = pipe.transformer.pos_embed.theta
    parallelized.undo()
    return {"latents": drawing.latents, "pixels": drawing.pixels, "steps": steps, "theta": theta}


@cache
def stock(from_picture: bool) -> tuple[Tensor, Tensor]:
    """Latents and bytes [B, 3, H, W] by diffusers alone, put together by hand as in CLEAR's notebook."""
    pipe = make_tiny_pipeline(sample_size=NATIVE)
    pipe.set_progress_bar_config(disable=True)
    static = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config, use_dynamic_shifting=False)
    refining = FluxImg2ImgPipeline(**{**pipe.components, "scheduler": static})
    refining.set_progress_bar_config(disable=True)
    stages = upscaling_stages() if from_picture else STAGES
    pictures = [Image.fromarray(PICTURE)]
    common: dict[str, Any] = {"prompt": PROMPTS[:1] if from_picture else PROMPTS, "max_sequence_length": TEXT}
    for index, stage in enumerate(stages):
        common |= {"height": stage.height, "width": stage.width, "output_type": "latent"}
        common["generator"] = torch.Generator().manual_seed((SEED + index * SEED_STRIDE) % 2**63)
        if isinstance(stage.sampling, Upscaling):
            start = official_start(pipe, pictures, stage.size)
            with_paper_changes(pipe.transformer, stage)
            # Half of four steps.
            settings: dict[str, Any] = {"num_inference_steps": 4, "strength": 0.5, "guidance_scale": 7.5}
            latents = refining(image=start, **settings, **common).images
        else:
            latents = pipe(num_inference_steps=2, guidance_scale=3.5, **common).images
        unpacked = pipe._unpack_latents(latents, stage.height, stage.width, pipe.vae_scale_factor)
        scaled = unpacked / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor
        pictures = pipe.image_processor.postprocess(pipe.vae.decode(scaled).sample, output_type="pil")
    return latents, torch.from_numpy(np.stack([np.asarray(each) for each in pictures])).permute(0, 3, 1, 2)


def official_start(pipe: Any, pictures: list[Image.Image], size: Size) -> Tensor:
    """Latents of enlarged pictures as in CLEAR's notebook, `image=image.resize(...)`, but for the encoder's noise."""
    large = [picture.resize(size[::-1]) for picture in pictures]
    mean = pipe.vae.encode(pipe.image_processor.preprocess(large, *size)).latent_dist.mode()
    return (mean - pipe.vae.config.shift_factor) * pipe.vae.config.scaling_factor


def with_paper_changes(transformer: Any, stage: Stage) -> None:
    """NTK factor 10, and scores scaled by log(n) / log(n0), through the weights that queries are linear in."""
    transformer.pos_embed = FluxPosEmbed(theta=100_000, axes_dim=transformer.config.axes_dims_rope)
    keys = TEXT + stage.height * stage.width // 256
    factor = math.sqrt(math.log(keys) / math.log(TEXT + (NATIVE // 16) ** 2))
    fresh = make_tiny_pipeline(sample_size=NATIVE).transformer.state_dict()
    for name, weight in transformer.named_parameters():
        if name.endswith(("norm_q.weight", "norm_added_q.weight")):
            weight.copy_(fresh[name] * factor)


def upscaling_stages() -> tuple[Stage, ...]:
    return plan_upscaling((76, 62), SIZE, native=NATIVE, token=16, upscaling=UPSCALING)


def test_the_stages_are_those_that_the_tests_below_mean() -> None:
    assert [stage.size for stage in STAGES] == [(64, 64), (112, 96), SIZE]
    assert [stage.size for stage in upscaling_stages()] == [(128, 96), SIZE]


@pytest.mark.parametrize("size", [1, 2, 5])
@pytest.mark.parametrize("from_picture", [False, True])
def test_full_attention_is_stock_diffusers_stage_by_stage(size: int, from_picture: bool) -> None:
    """On 5 ranks the first stage, of 4 rows, leaves one idle; on 2, stripes are of columns, but in the VAE."""
    stages = upscaling_stages() if from_picture else STAGES
    cut = "columns" if size == 2 else "auto"
    results = run_ranks(drawn, size, stages, from_picture, window="full", cut=cut)
    latents, pixels = stock(from_picture)
    for result in results:
        assert relative_error(result["latents"], latents) < ROUNDED
        assert result["theta"] == 10_000
    drawn_pixels = torch.cat([result["pixels"] for result in results], dim=2)
    assert (drawn_pixels.int() - pixels.int()).abs().max() <= 1


def started(group: Group) -> tuple[Tensor, Tensor]:
    """Latents of the first stage, and those that the second one starts from; the decoder goes far beyond [-1, 1]."""
    pipe = trained_pipeline()
    clear_dist.parallelize(pipe, group=group)
    adapter, counters = adapter_of(pipe), require_striped(pipe).counters
    cascade = Cascade(pipe, encode_prompts(adapter, group, counters, PROMPTS, max_sequence_length=TEXT), seed=SEED)
    first = cascade.draw(Stage(height=128, width=128, sampling=Sampling(steps=2)))
    with patch.object(type(adapter), "denoise", autospec=True, side_effect=type(adapter).denoise) as denoise:
        cascade.draw(Stage(height=272, width=256, sampling=Upscaling(steps=1)), first)
    assert first.latents is not None
    return first.latents, denoise.call_args.kwargs["start"]


def trained_pipeline() -> FluxPipeline:
    pipe = FluxPipeline.from_pretrained(WEIGHTS)
    pipe.set_progress_bar_config(disable=True)
    for weight in pipe.vae.decoder.conv_out.parameters():
        weight.requires_grad_(False).mul_(1.5)
    return pipe


@pytest.mark.parametrize("size", [1, 3])
def test_the_second_stage_starts_as_in_the_official_notebook(size: int) -> None:
    """`image=image.resize((width, height))` of 8-bit pictures, to CLEAR's image-to-image, whose encoder draws noise."""
    pipe = trained_pipeline()
    config = pipe.vae.config
    for latents, start in run_ranks(started, size):
        with torch.no_grad():
            unpacked = pipe._unpack_latents(latents, 128, 128, 8) / config.scaling_factor + config.shift_factor
            decoded = pipe.vae.decode(unpacked).sample
            pictures = [each.resize((256, 272)) for each in pipe.image_processor.postprocess(decoded)]
            image = pipe.image_processor.preprocess(pictures, height=272, width=256)
            official = FluxImg2ImgPipeline._encode_vae_image(pipe, image, torch.Generator().manual_seed(0))
        assert decoded.abs().max() > 1.2
        assert relative_error(start, official) < 0.005


@pytest.mark.parametrize("size", [4, 7])
def test_exact_windows_on_n_ranks_are_those_on_one(size: int) -> None:
    arguments: dict[str, Any] = {"window": 3, "text_attention": "exact"}
    alone = run_ranks(drawn, 1, STAGES, False, **arguments)[0]
    for result in run_ranks(drawn, size, STAGES, False, **arguments):
        assert relative_error(result["latents"], alone["latents"]) < ROUNDED
        assert result["steps"] == alone["steps"]  # idle ranks too
        assert set(result["steps"].values()) == {6}


@pytest.mark.parametrize(("size", "ranks"), [(4, (1, 3)), (5, (2, 9))])
def test_stages_on_fewer_ranks_draw_the_same(size: int, ranks: tuple[int, int]) -> None:
    """The others are idle, count as many steps, and take part again where all draw."""
    arguments: dict[str, Any] = {"window": 3, "text_attention": "exact"}
    lower = (replace(stage, ranks=most) for stage, most in zip(STAGES[:2], ranks, strict=True))
    alone = run_ranks(drawn, 1, STAGES, False, **arguments)[0]
    for result in run_ranks(drawn, size, (*lower, STAGES[2]), False, **arguments):
        assert relative_error(result["latents"], alone["latents"]) < ROUNDED
        assert result["steps"] == alone["steps"]


def test_halos_lag_within_the_ranks_of_a_stage() -> None:
    """The stale schedule on 2 of 3 ranks is that on 2; the picture then goes on on all."""
    arguments: dict[str, Any] = {"window": 3, "text_attention": "exact", "schedule": "stale", "warmup_steps": 1}
    few, lone = ((replace(STAGES[0], ranks=most, sampling=Sampling(steps=4)),) for most in (2, None))
    on_three, on_two = run_ranks(first_latents, 3, *few, **arguments), run_ranks(first_latents, 2, *lone, **arguments)
    assert on_three[2] is None
    for ours, expected in zip(on_three, on_two, strict=False):
        assert torch.equal(ours, expected)


def first_latents(group: Group, stage: Stage, **arguments: Any) -> Tensor | None:
    pipe = make_tiny_pipeline(sample_size=NATIVE)
    pipe.set_progress_bar_config(disable=True)
    clear_dist.parallelize(pipe, group=group, **arguments)
    counters = require_striped(pipe).counters
    embeddings = encode_prompts(adapter_of(pipe), group, counters, PROMPTS, max_sequence_length=TEXT)
    return Cascade(pipe, embeddings, seed=SEED).draw(stage).latents


def refused_with_shards(group: Group) -> None:
    stage = Stage(height=64, width=64, sampling=SAMPLING, ranks=1)
    with pytest.raises(ValueError, match=r"sharded weights need all ranks in every stage.*got 2 ranks; nearest: 1"):
        first_latents(group, stage, window=3, shard_weights=True)


def test_sharded_weights_need_all_ranks() -> None:
    run_ranks(refused_with_shards, 2)
    with pytest.raises(ValueError, match="at least one rank, got 0"):
        Stage(height=64, width=64, ranks=0)


def drawn_in_bfloat16(group: Group) -> set[torch.dtype]:
    pipe = make_tiny_pipeline(sample_size=NATIVE).to(torch.bfloat16)
    pipe.set_progress_bar_config(disable=True)
    clear_dist.parallelize(pipe, window=3, group=group)
    pictures = clear_dist.generate(
        pipe, "a hill", height=128, width=96, num_inference_steps=2, upscaling=UPSCALING, max_sequence_length=TEXT
    )
    assert len(pictures) == (group.rank == 0)
    return {parameter.dtype for part in (pipe.transformer, pipe.vae) for parameter in part.parameters()}


def test_a_pipeline_in_bfloat16_stays_one() -> None:
    assert run_ranks(drawn_in_bfloat16, 2) == [{torch.bfloat16}] * 2


def asked_differently(group: Group) -> str:
    pipe = make_tiny_pipeline(sample_size=NATIVE)
    clear_dist.parallelize(pipe, window=3, group=group)
    size = 128 + 64 * group.rank
    messages = []
    for call in (
        lambda: clear_dist.generate(pipe, "a hill", height=size, width=size, max_sequence_length=TEXT),
        lambda: clear_dist.upscale(pipe, Image.fromarray(PICTURE), height=size, width=size, max_sequence_length=TEXT),
    ):
        with pytest.raises(ValueError, match="stages must be the same on all ranks") as caught:
            call()
        messages.append(str(caught.value))
    with pytest.raises(ValueError, match="rank 0 must be given the picture"):
        clear_dist.upscale(pipe, None, height=128, width=128)
    return messages[0]


def test_ranks_that_are_asked_differently_are_told() -> None:
    assert len(set(run_ranks(asked_differently, 2))) == 1


def pictures(group: Group) -> list[np.ndarray]:
    pipe = make_tiny_pipeline(sample_size=NATIVE)
    pipe.set_progress_bar_config(disable=True)
    clear_dist.parallelize(pipe, window="full", group=group)
    common: dict[str, Any] = {"height": SIZE[0], "width": SIZE[1], "max_sequence_length": TEXT, "seed": SEED}
    large = clear_dist.generate(pipe, PROMPTS, num_inference_steps=2, upscaling=UPSCALING, **common)
    upscaled = clear_dist.upscale(pipe, Image.fromarray(PICTURE), PROMPTS[0], upscaling=UPSCALING, **common)
    return [np.asarray(picture) for picture in (*large, *upscaled)]


def test_generate_and_upscale_return_pictures_on_rank_0() -> None:
    first, *others = run_ranks(pictures, 3)
    assert others == [[], []]
    expected = torch.cat([stock(False)[1], stock(True)[1]]).permute(0, 2, 3, 1).numpy().astype(int)
    assert len(first) == 3
    for picture, values in zip(first, expected, strict=True):
        assert picture.shape == (*SIZE, 3)
        assert np.abs(picture - values).max() <= 1
