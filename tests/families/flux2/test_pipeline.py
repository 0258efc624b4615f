"""FLUX.2's pipelines: stages of a cascade against unmodified diffusers put together by hand, the VAE, the commands."""

import math
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline
from diffusers.models.transformers.transformer_flux2 import Flux2PosEmbed
from PIL import Image
from torch import Tensor

import clear_dist
from clear_dist.cards.folder import read_folder
from clear_dist.cli import main
from clear_dist.comm.group import Group
from clear_dist.drawing.cascade import SEED_STRIDE, Cascade
from clear_dist.drawing.prompts import encode_prompts
from clear_dist.engine.striped import require_striped
from clear_dist.families.cards import CARDS
from clear_dist.families.flux2.card import DEV
from clear_dist.families.transformers import adapter_of
from clear_dist.geometry import cut_in_stripes
from clear_dist.launch.env import Place
from clear_dist.options import Refusal
from clear_dist.plan import model
from clear_dist.plan.asked import PlanRequest
from clear_dist.request.flags import GenerateFlags
from clear_dist.request.hardware import LINKS
from clear_dist.request.settle import settle
from clear_dist.stages import Sampling, Stage, Upscaling
from clear_dist.vae import decode_stripes, encode_stripes
from tests.families.flux2.tiny import draw_statistics, make_tiny_dev, make_tiny_folder, make_tiny_klein, make_tiny_vae
from tests.families.tiny import save_pipeline
from tests.ranks import run_ranks
from tests.test_parallelize import relative_error
from tests.tiny import draw_weights

NATIVE, SEED, TEXT = 64, 11, 40
NTK, STRENGTH, STEPS = 10.0, 0.5, 2
PROMPTS = ["a hill", "a lake"]
ROUNDED = 5e-4
"""Between stages, where a value near the middle of two bytes may become either."""


def stages(scale: float) -> tuple[Stage, ...]:
    sampling = Sampling(steps=STEPS, guidance_scale=0.0, true_cfg_scale=scale)
    upper = Upscaling(steps=STEPS, guidance_scale=0.0, true_cfg_scale=scale, strength=STRENGTH, ntk_factor=NTK)
    return Stage(height=64, width=64, sampling=sampling), Stage(height=112, width=96, sampling=upper)


def drawn(group: Group, *, is_distilled: bool) -> tuple[Tensor, Tensor]:
    pipe = make_tiny_klein(sample_size=NATIVE, is_distilled=is_distilled)
    pipe.set_progress_bar_config(disable=True)
    handle = clear_dist.parallelize(pipe, group=group, window="full")
    counters, negative = require_striped(pipe).counters, None if is_distilled else ["fog", "fog"]
    embeddings = encode_prompts(
        adapter_of(pipe), group, counters, PROMPTS, negative_prompts=negative, max_sequence_length=TEXT
    )
    *_, drawing = Cascade(pipe, embeddings, seed=SEED).run(stages(1.0 if is_distilled else 3.0))
    assert drawing.pixels is not None and drawing.latents is not None
    assert pipe.transformer.pos_embed.theta == 2000
    handle.undo()
    return drawing.latents, drawing.pixels


@cache
def stock(is_distilled: bool) -> tuple[Tensor, Tensor]:
    """Latents in the VAE's layout, and bytes [B, 3, H, W], by diffusers alone."""
    pipe = make_tiny_klein(sample_size=NATIVE, is_distilled=is_distilled)
    pipe.set_progress_bar_config(disable=True)
    common: dict[str, Any] = {"num_inference_steps": STEPS, "output_type": "latent"}
    common["prompt_embeds"] = pipe.encode_prompt(PROMPTS, max_sequence_length=TEXT)[0]
    if not is_distilled:
        common["negative_prompt_embeds"] = pipe.encode_prompt(["fog", "fog"], max_sequence_length=TEXT)[0]
    common["guidance_scale"] = 1.0 if is_distilled else 3.0
    first = pipe(height=64, width=64, generator=torch.Generator().manual_seed(SEED), **common).images
    pictures = pipe.image_processor.postprocess(pipe.vae.decode(first).sample, output_type="pil")

    large = torch.stack([torch.from_numpy(np.array(each.resize((96, 112)))) for each in pictures]).permute(0, 3, 1, 2)
    mean = pipe.vae.encode(large / 127.5 - 1).latent_dist.mode()
    tokens = torch.nn.functional.pixel_unshuffle(mean, 2)  # each channel's 2 x 2, beside each other
    statistics = pipe.vae.bn.running_mean, (pipe.vae.bn.running_var + pipe.vae.config.batch_norm_eps).sqrt()
    normed = (tokens - statistics[0][:, None, None]) / statistics[1][:, None, None]
    noise = torch.randn(normed.shape, generator=torch.Generator().manual_seed((SEED + SEED_STRIDE) % 2**63))
    shifted = 3 * STRENGTH / (1 + 2 * STRENGTH)
    start = shifted * noise + (1 - shifted) * normed

    pipe.transformer.pos_embed = Flux2PosEmbed(theta=NTK * 2000, axes_dim=[4, 4, 4, 4])
    factor = math.sqrt(math.log(TEXT + 7 * 6) / math.log(TEXT + 4 * 4))
    for name, weight in pipe.transformer.named_parameters():
        if name.endswith(("norm_q.weight", "norm_added_q.weight")):
            weight.mul_(factor)  # of scores
    static = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config, use_dynamic_shifting=False)
    parts = {**pipe.components, "scheduler": static, "is_distilled": is_distilled}
    refining = Flux2KleinPipeline(**parts)
    refining.set_progress_bar_config(disable=True)
    last = refining(height=112, width=96, latents=start, sigmas=[STRENGTH, STRENGTH / 2], **common).images
    pixels = pipe.vae.decode(last).sample.mul(127.5).add(127.5).clamp(0, 255).round()
    return last, pixels.to(torch.uint8)


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("is_distilled", [True, False])
@torch.no_grad()
def test_stages_are_stock_diffusers_put_together(size: int, is_distilled: bool) -> None:
    expected, pixels = stock(is_distilled)
    results = run_ranks(drawn, size, is_distilled=is_distilled)
    pipe = make_tiny_klein(sample_size=NATIVE)
    for latents, _ in results:
        whole = adapter_of(pipe).unpacked(latents, slice(None), (112, 96))
        assert relative_error(whole, expected) < ROUNDED
    found = torch.cat([mine for _, mine in results], dim=2)
    assert (found.int() - pixels.int()).abs().max() <= 1


def coded(group: Group, rows: int) -> list[Tensor]:
    """One rank's rows of the decoded latents, and of the encoded pixels."""
    generator = torch.Generator().manual_seed(0)
    vae = draw_statistics(draw_weights(make_tiny_vae(), generator), generator)
    latents, pixels = torch.randn(2, 32, 2 * rows, 6), torch.randn(2, 3, 16 * rows, 48)
    latents, pixels = (group.broadcast_tensors([x])[0] for x in (latents, pixels))
    stripes = cut_in_stripes(rows, group.size)
    mine = stripes[group.rank]
    decoded = decode_stripes(vae, latents[:, :, 2 * mine.start : 2 * mine.stop], group, stripes)
    encoded = encode_stripes(vae, pixels[:, :, 16 * mine.start : 16 * mine.stop], group, stripes)
    with torch.no_grad():
        return [decoded, encoded, vae.decode(latents).sample, vae.encode(pixels).latent_dist.parameters]


@pytest.mark.parametrize("size", [1, 3])
def test_the_vae_over_stripes_is_diffusers(size: int) -> None:
    results = run_ranks(coded, size, 5)
    for number in (0, 1):
        whole = torch.cat([found[number] for found in results], dim=2)
        assert relative_error(whole, results[0][number + 2]) < 1e-4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_folder(tmp_path_factory.mktemp("klein"))


def command(*words: str) -> int:
    with pytest.raises(SystemExit) as ending:
        main(list(words))
    return int(ending.value.code or 0)


def test_generate_and_upscale(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    common = ("--model", str(folder), "--device", "cpu", "--quiet", "--max-sequence-length", "16")
    assert command("generate", "a hill", "--res", "192", "--negative-prompt", "fog", *common) == 0
    said = capsys.readouterr().err
    assert "longer than the 16 tokens that Qwen3 takes here; cut off" in said
    assert "--negative-prompt has no effect: this model takes none" in said
    with Image.open("clear-dist.png") as picture:
        assert picture.size == (192, 192)
    assert command("upscale", "clear-dist.png", "--res", "256", *common) == 0
    with Image.open("clear-dist-upscaled.png") as picture:
        assert picture.size == (256, 256)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--true-cfg-scale", "3"), "--true-cfg-scale must be 1 where a model takes no negative prompts, got 3"),
        (("--res", "100"), "--res must be a multiple of 16 pixels"),
    ],
)
def test_what_it_cannot_do_is_refused(
    folder: Path, words: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("generate", "a hill", "--model", str(folder), "--device", "cpu", *words) == 2
    assert message in capsys.readouterr().err


def test_negative_prompts_are_refused_from_python() -> None:
    pipe = make_tiny_klein()
    handle = clear_dist.parallelize(pipe)
    guided = {"negative_prompt": "fog", "true_cfg_scale": 2.0}
    with pytest.raises(ValueError, match="takes no negative prompts"):
        clear_dist.generate(pipe, "a hill", num_inference_steps=1, max_sequence_length=16, **guided)
    handle.undo()


def test_dev_draws_what_its_pipeline_draws() -> None:
    pipe = make_tiny_dev()
    pipe.set_progress_bar_config(disable=True)
    embeddings = torch.randn(1, 5, 24)
    sampling = Sampling(steps=2, guidance_scale=4.0)
    expected = pipe(
        prompt_embeds=embeddings, height=64, width=48, num_inference_steps=2, guidance_scale=4.0, output_type="np",
        generator=torch.Generator().manual_seed(3),
    ).images  # fmt: skip
    adapter = adapter_of(pipe)
    stage = Stage(height=64, width=48, sampling=sampling)
    latents = adapter.denoise(pipe, {"prompt_embeds": embeddings}, stage, seed=3)
    with torch.no_grad():
        pixels = pipe.vae.decode(adapter.for_vae(adapter.unpacked(latents, slice(None), (64, 48)))).sample
    found = (pixels / 2 + 0.5).clamp(0, 1)[0].permute(1, 2, 0).numpy()
    assert np.abs(found - expected[0]).max() < 1e-4


def test_what_dev_cuts_off_is_told() -> None:
    pipe = make_tiny_dev()
    adapter = adapter_of(pipe)
    whole = pipe.encode_prompt("a hill", max_sequence_length=2000)[0]
    counted = next(number for number in range(1, 2000) if not adapter.too_long("a hill", number))
    assert relative_error(pipe.encode_prompt("a hill", max_sequence_length=counted)[0], whole[:, :counted]) < 1e-5
    (line,) = adapter.too_long("a hill", counted - 3)
    assert line.startswith(f"longer than the {counted - 3} tokens that Mistral takes here; cut off: ")


def test_a_folder_of_dev_is_known(tmp_path: Path) -> None:
    facts = read_folder(save_pipeline(make_tiny_dev(), tmp_path), CARDS)
    assert facts.card is DEV and facts.takes_guidance and not facts.takes_negative_prompts
    assert (facts.sampling.steps, facts.sampling.guidance_scale, facts.token_size) == (50, 4.0, 16)
    planned = model.find(facts)
    assert planned is not None
    assert (planned.text.channels, planned.text.hidden, planned.text.heads) == (8, 16, 2)


def test_dev_needs_a_package_for_its_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clear_dist.request.settle.find_spec", lambda package: None)
    with pytest.raises(
        Refusal, match=r"FLUX\.2-dev needs the package torchvision, .*; nearest: pip install torchvision"
    ):
        settle(GenerateFlags(model="flux2-dev", device="cpu"), Place(), CARDS)
    assert settle(GenerateFlags(model="flux2-klein-4b", device="cpu"), Place(), CARDS)[0].window == "full"


LOOKED_AT = Image.fromarray(np.random.default_rng(3).integers(0, 256, (80, 96, 3), np.uint8))


def looking(group: Group) -> list[np.ndarray]:
    pipe = make_tiny_klein(sample_size=NATIVE)
    pipe.set_progress_bar_config(disable=True)
    clear_dist.parallelize(pipe, group=group, window="full")
    given: dict[str, Any] = {"num_inference_steps": STEPS, "max_sequence_length": TEXT, "seed": SEED}
    with pytest.raises(ValueError, match="mask_image and strength are for image to image, got Flux2KleinPipeline"):
        clear_dist.generate(pipe, "a hill", image=LOOKED_AT, strength=0.5)
    image = LOOKED_AT if group.rank == 0 else None
    pictures = clear_dist.generate(pipe, "a hill", image=image, height=64, width=48, **given)
    upper = Upscaling(steps=1, guidance_scale=0.0)
    pictures += clear_dist.generate(pipe, "a hill", image=image, height=128, width=96, upscaling=upper, **given)
    return [np.asarray(picture).astype(int) for picture in pictures]


def test_a_picture_is_looked_at_as_by_the_stock_pipeline() -> None:
    alone, two = (run_ranks(looking, size)[0] for size in (1, 2))
    pipe = make_tiny_klein(sample_size=NATIVE)
    common: dict[str, Any] = {"num_inference_steps": STEPS, "max_sequence_length": TEXT, "height": 64, "width": 48}
    generators = [torch.Generator().manual_seed(SEED) for _ in range(2)]
    looked, blind = (
        np.asarray(pipe(prompt="a hill", generator=generator, **picture, **common).images[0]).astype(int)
        for generator, picture in zip(generators, ({"image": LOOKED_AT}, {}), strict=True)
    )
    for found in (alone, two):
        assert np.abs(found[0] - looked).max() <= 1
        assert np.abs(found[1] - alone[1]).max() <= 2
    assert np.abs(looked - blind).max() > 20


def test_a_picture_that_is_looked_at_is_checked_and_planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (2048, 1024), "white").save("in.png")
    given: dict[str, Any] = {"model": "flux2-klein-4b", "device": "cpu", "image": Path("in.png")}
    request, facts, lines = settle(GenerateFlags(**given), Place(), CARDS)
    assert (
        request.looks
        and request.size == (720, 1440)
        and [stage.starts_from_picture for stage in request.stages] == [False]
    )
    assert "image: in.png is looked at, not drawn over" in lines
    planned = model.find(facts)
    assert planned is not None
    asked = PlanRequest(request=request, model=planned, gpu=None, link=LINKS["nvlink"])
    assert asked.reference == (45, 90)
    assert asked.text_tokens == 512 + 45 * 90
    with pytest.raises(Refusal, match=r"--mask is for models with image to image, got .*klein-4B"):
        settle(GenerateFlags(**given, mask=Path("in.png")), Place(), CARDS)
    with pytest.raises(Refusal, match="--strength is for a picture to start from"):
        settle(GenerateFlags(**given, strength=0.5), Place(), CARDS)
