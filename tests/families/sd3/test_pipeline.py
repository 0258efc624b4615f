"""SD3's pipelines on stripes: prompts, pictures, refinement, and what is refused, against stock diffusers."""

from pathlib import Path
from types import MethodType
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Img2ImgPipeline, StableDiffusion3InpaintPipeline
from diffusers.models.attention import JointTransformerBlock
from PIL.Image import fromarray
from torch import Tensor

import clear_dist
from clear_dist.comm.group import Group
from clear_dist.families.cards import CARDS
from clear_dist.families.sd3.card import CARD
from clear_dist.families.sd3.pipeline import SD3PipelineAdapter
from clear_dist.launch.env import Place
from clear_dist.request.flags import GenerateFlags
from clear_dist.request.settle import settle
from clear_dist.stages import Stage, Upscaling
from clear_dist.weights.loading import load_pipeline
from tests.families.sd3.test_stripes import draw, unsplit
from tests.families.sd3.tiny import make_tiny_pipeline, make_tiny_sd3
from tests.ranks import run_ranks
from tests.test_parallelize import relative_error

REQUEST: dict[str, Any] = {"height": 112, "width": 80, "num_inference_steps": 2, "max_sequence_length": 12}
GUIDED: dict[str, Any] = {"negative_prompt": "fog", "true_cfg_scale": 3.0}
UPPER = Upscaling(steps=2, strength=0.6, guidance_scale=0.0, true_cfg_scale=3.0)
ABOVE_THE_TABLE = (26, 3)
"""Rows and columns of tokens; the table has 24 of each."""


def picture(height: int, width: int) -> Any:
    values = np.random.default_rng(4).integers(0, 255, (height, width, 3), np.uint8)
    return fromarray(values)


def edited(pipe: Any, kind: type) -> Tensor:
    """Image-to-image or inpainting from a picture."""
    other = kind(**pipe.components)
    other.set_progress_bar_config(disable=True)
    mask = {"mask_image": picture(112, 80).convert("L")} if kind is StableDiffusion3InpaintPipeline else {}
    return other(
        prompt="a hill", negative_prompt="fog", image=picture(112, 80), height=112, width=80, strength=0.7,
        num_inference_steps=3, guidance_scale=3.0, max_sequence_length=12, output_type="latent",
        generator=torch.Generator().manual_seed(1), **mask,
    ).images  # fmt: skip


KINDS = (StableDiffusion3Img2ImgPipeline, StableDiffusion3InpaintPipeline)


def skipping(pipe: Any) -> Tensor:
    """With a pass that leaves out a block, of one picture."""
    return pipe(
        prompt="a hill", height=112, width=80, num_inference_steps=3, guidance_scale=3.0, output_type="latent",
        skip_guidance_layers=[1], skip_layer_guidance_start=0.01, skip_layer_guidance_stop=0.9,
        max_sequence_length=12, generator=torch.Generator().manual_seed(1),
    ).images  # fmt: skip


def unguided_twice(pipe: Any) -> list[Tensor]:
    """The same embeddings in generations of two sizes."""
    with torch.no_grad():
        text, pooled = SD3PipelineAdapter(pipe).encode(["a lake"], 12)
    given = {"prompt_embeds": text, "pooled_prompt_embeds": pooled, "guidance_scale": 1.0}
    return [
        pipe(
            **given,
            height=height,
            width=64,
            num_inference_steps=1,
            output_type="latent",
            generator=torch.Generator().manual_seed(1),
        ).images
        for height in (96, 112)
    ]


def on_stripes(group: Group) -> dict[str, Any]:
    pipe, found = make_tiny_pipeline("medium"), {}
    if group.rank > 0:
        names = [f"{part}{n}" for part in ("text_encoder", "tokenizer") for n in ("", "_2", "_3")]
        pipe.register_modules(**dict.fromkeys(names))
    handle = clear_dist.parallelize(pipe, window="full", group=group)
    drawn = clear_dist.generate(pipe, ["a hill", "a lake"], seed=5, cascade=False, **REQUEST, **GUIDED)
    found["generated"] = [np.asarray(each) for each in drawn]
    for name, request in {
        "cascade": {"height": 256, "width": 192, "num_inference_steps": 2, "upscaling": UPPER},
        "schedule": {"height": 256, "width": 192, "num_inference_steps": 2, "upscaling": UPPER, "cascade": False},
    }.items():
        found[name] = [np.asarray(each) for each in clear_dist.generate(pipe, "a hill", seed=2, **request, **GUIDED)]
    enlarged = clear_dist.upscale(
        pipe, picture(96, 80), "a hill", height=256, width=208, negative_prompt="fog", upscaling=UPPER
    )
    found["upscaled"] = [np.asarray(each) for each in enlarged]
    handle.undo()
    pipe = make_tiny_pipeline("medium")
    clear_dist.parallelize(pipe, window="full", group=group)
    found["edited"] = [edited(pipe, kind) for kind in KINDS]
    found["skipping"], found["unguided"] = skipping(pipe), unguided_twice(pipe)
    found["above"] = draw(pipe, rows=ABOVE_THE_TABLE[0], columns=ABOVE_THE_TABLE[1], steps=1)
    return found


@pytest.fixture(scope="module")
def drawn() -> dict[int, list[dict[str, Any]]]:
    return {size: run_ranks(on_stripes, size) for size in (1, 2)}


def test_pictures_are_the_stock_pipelines(drawn: dict[int, list[dict[str, Any]]]) -> None:
    stock = make_tiny_pipeline("medium")(
        ["a hill", "a lake"],
        negative_prompt=["fog", "fog"],
        guidance_scale=3.0,
        **REQUEST,
        generator=torch.Generator().manual_seed(5),
        output_type="np",
    ).images
    for found in drawn.values():
        assert [len(each["generated"]) for each in found] == [2] + [0] * (len(found) - 1)
        for mine, expected in zip(found[0]["generated"], stock, strict=True):
            assert np.abs(mine / 255 - expected).max() < 1.5 / 255


def test_two_ranks_refine_as_one(drawn: dict[int, list[dict[str, Any]]]) -> None:
    for name, shape in (("cascade", (256, 192, 3)), ("schedule", (256, 192, 3)), ("upscaled", (256, 208, 3))):
        (one,), (two,) = (drawn[size][0][name] for size in (1, 2))
        assert one.shape == shape
        assert np.abs(one.astype(int) - two.astype(int)).max() <= 1, name


def test_image_to_image_and_inpainting_are_stock(drawn: dict[int, list[dict[str, Any]]]) -> None:
    for index, kind in enumerate(KINDS):
        expected = edited(make_tiny_pipeline("medium"), kind)
        for found in (each for ranks in drawn.values() for each in ranks):
            assert relative_error(found["edited"][index], expected) < 1e-4, kind


def test_layers_may_be_skipped(drawn: dict[int, list[dict[str, Any]]]) -> None:
    expected = skipping(make_tiny_pipeline("medium"))
    for found in (each for ranks in drawn.values() for each in ranks):
        assert relative_error(found["skipping"], expected) < 1e-4


def test_embeddings_may_serve_two_generations(drawn: dict[int, list[dict[str, Any]]]) -> None:
    expected = unguided_twice(make_tiny_pipeline("medium"))
    for found in (each for ranks in drawn.values() for each in ranks):
        for mine, theirs in zip(found["unguided"], expected, strict=True):
            assert relative_error(mine, theirs) < 1e-4


def test_above_the_table_one_rank_draws_what_two_draw(drawn: dict[int, list[dict[str, Any]]]) -> None:
    one, (two, other) = drawn[1][0]["above"], (each["above"] for each in drawn[2])
    assert torch.equal(two, other) and relative_error(two, one) < 1e-4
    with pytest.raises(ValueError, match="cannot be greater than"):
        draw(make_tiny_pipeline("medium"), rows=ABOVE_THE_TABLE[0], columns=ABOVE_THE_TABLE[1], steps=1)


def test_refinement_is_stock_image_to_image() -> None:
    """On one rank: levels of noise from the strength down, guidance, and the VAE's scale."""
    pipe, group = make_tiny_pipeline(), Group.create("cpu")
    stage = Stage(height=112, width=80, sampling=UPPER)
    start = torch.randn(1, 16, 14, 10, generator=torch.Generator().manual_seed(2))
    adapter = SD3PipelineAdapter(pipe)
    both = (*adapter.encode(["a hill"], 12), *adapter.encode(["fog"], 12))
    embeddings = {name: x for name, x in zip(adapter.arguments, both, strict=True) if x is not None}
    expected = StableDiffusion3Img2ImgPipeline(**pipe.components)(
        **embeddings, image=start, height=112, width=80, strength=1.0, sigmas=[0.6, 0.3], guidance_scale=3.0,
        num_inference_steps=2, output_type="latent", generator=torch.Generator().manual_seed(9),
    ).images  # fmt: skip
    try:
        clear_dist.parallelize(pipe, window="full", group=group)
        found = adapter.denoise(adapter.refining(stage), embeddings, stage, seed=9, start=start)
    finally:
        group.close()
    assert relative_error(found, expected) < 1e-4
    mean = torch.randn(1, 16, 4, 4)
    assert torch.allclose(adapter.for_vae(adapter.from_vae(mean)), mean, atol=1e-6)
    assert torch.equal(adapter.unpacked(found, slice(1, 3), (112, 80)), found[:, :, 2:6])


def test_what_has_no_stripes_is_refused() -> None:
    pipe, group = make_tiny_pipeline(), Group.create("cpu")
    try:
        clear_dist.parallelize(pipe, window="full", group=group)
        one = torch.zeros(1)
        inputs = {
            "hidden_states": torch.zeros(1, 16, 8, 8),
            "encoder_hidden_states": torch.zeros(1, 3, 40),
            "pooled_projections": torch.zeros(1, 40),
            "timestep": one,
        }
        with torch.no_grad(), pytest.raises(ValueError, match="SD3's ControlNets cannot be parallelised"):
            pipe.transformer(**inputs, block_controlnet_hidden_states=[one])
        with torch.no_grad(), pytest.raises(ValueError, match="IP-Adapters cannot be combined"):
            pipe.transformer(**inputs, joint_attention_kwargs={"ip_adapter_image_embeds": one})
        with torch.no_grad(), pytest.raises(ValueError, match="multiples of 2, got 7 x 8"):
            pipe.transformer(**{**inputs, "hidden_states": torch.zeros(1, 16, 7, 8)})
    finally:
        group.close()


def test_prompts_that_are_cut_off_are_told() -> None:
    lines = SD3PipelineAdapter(make_tiny_pipeline()).too_long("x" * 90, 64)
    assert [line.split(" takes")[0] for line in lines] == [
        "longer than the 77 tokens that CLIP",
        "longer than the 64 tokens that T5",
    ]


def test_a_folder_is_settled_and_loaded(tmp_path: Path) -> None:
    folder = make_tiny_sd3(tmp_path / "model", "medium")
    settled = settle(GenerateFlags(model=str(folder), device="cpu"), Place(), CARDS)[0]
    assert (settled.size, settled.token_size, settled.window) == ((128, 128), 16, "full")
    assert (settled.sampling.steps, settled.sampling.true_cfg_scale, settled.max_sequence_length) == (40, 4.5, 256)
    where: dict[str, Any] = {"dtype": torch.float32, "device": torch.device("cpu")}
    pipe = load_pipeline(folder, CARD, with_text_encoders=True, **where)
    saved = make_tiny_pipeline("medium")
    for name in ("transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3"):
        expected = getattr(saved, name).state_dict()
        found = getattr(pipe, name).state_dict()
        assert all(torch.equal(found[key], x) for key, x in expected.items()), name


def by_stock_blocks(group: Group) -> Tensor:
    """Hooks of others, which bring weights, keep a block's forward as it was before `parallelize`."""
    pipe = make_tiny_pipeline("medium")
    for block in pipe.transformer.transformer_blocks:
        block.forward = MethodType(JointTransformerBlock.forward, block)
    handle = clear_dist.parallelize(pipe, window=3, text_attention="exact", text_tokens="sharded", group=group)
    found = draw(pipe)
    handle.undo()
    assert {type(block) for block in pipe.transformer.transformer_blocks} == {JointTransformerBlock}
    return found


def test_blocks_whose_forward_others_keep_draw_the_same() -> None:
    for found in run_ranks(by_stock_blocks, 2):
        assert relative_error(found, unsplit("medium", 3)) < 1e-4
