"""UltraFlux from its folder to a picture: tokens of 32 pixels, YaRN, a VAE with a stride, a static shift."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxImg2ImgPipeline
from PIL import Image

import clear_dist
from clear_dist.cards.folder import ModelFacts
from clear_dist.cli import main
from clear_dist.comm.group import Group
from clear_dist.commands import distill
from clear_dist.drawing.beyond import extrapolation_of
from clear_dist.drawing.cascade import Cascade
from clear_dist.drawing.prompts import encode_prompts
from clear_dist.engine.extrapolation import Extrapolation, attention_scale
from clear_dist.engine.striped import require_striped
from clear_dist.families.cards import CARDS
from clear_dist.families.flux import pipeline
from clear_dist.families.transformers import adapter_of
from clear_dist.launch.env import Place
from clear_dist.options import Refusal
from clear_dist.request.distill import Recipe
from clear_dist.request.flags import GenerateFlags
from clear_dist.request.request import Request
from clear_dist.request.settle import located, settle
from clear_dist.stages import Sampling, Stage, Upscaling
from clear_dist.weights.loading import load_pipeline
from tests.drawing.test_cascade import TEXT, official_start, relative_error
from tests.oracle import DenseClearProcessor
from tests.ranks import run_ranks
from tests.refining.drawing import PROMPT, SEED, Drawn, picture_of, seed_of
from tests.tiny import make_tiny_flux
from tests.tiny_controlnet import make_tiny_controlnet
from tests.ultraflux import TOKEN, make_official, make_ultraflux, make_ultraflux_folder

LOWER = Stage(height=36 * TOKEN, width=TOKEN, sampling=Sampling(steps=2))
UPPER = Stage(height=70 * TOKEN, width=2 * TOKEN, sampling=Upscaling(steps=2, strength=0.5))
NATIVE = 4
"""Tokens along a side, where stages are to be above the native size."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_ultraflux_folder(tmp_path_factory.mktemp("ultraflux") / "model")


def drawn(group: Group, window: Any, native: int) -> Drawn:
    pipe = make_ultraflux()
    clear_dist.parallelize(pipe, group=group, window=window, text_attention="exact")
    with mock.patch.object(pipeline, "YARN_NATIVE_TOKENS", native):
        counters = require_striped(pipe).counters
        embeddings = encode_prompts(adapter_of(pipe), group, counters, [PROMPT], max_sequence_length=TEXT)
        cascade = Cascade(pipe, embeddings, seed=SEED)
        return [(each.latents, each.pixels) for each in cascade.run((LOWER, UPPER))]


@pytest.mark.parametrize(("size", "window", "native"), [(1, "full", 128), (2, 3, NATIVE), (3, "full", NATIVE)])
def test_a_cascade_is_diffusers_with_its_formulas(size: int, window: Any, native: int) -> None:
    """Above the native size too: neither another base nor scaled scores, which NTK's factor of 10 would bring."""
    found = run_ranks(drawn, size, window, native)
    pipe = make_official()
    common: dict[str, Any] = {"prompt": PROMPT, "max_sequence_length": TEXT, "output_type": "latent"}
    generators = [torch.Generator().manual_seed(seed_of(stage)) for stage in range(2)]

    def see(stage: Stage) -> dict[str, int]:
        if window != "full":
            grid = stage.height // TOKEN, stage.width // TOKEN
            pipe.transformer.set_attn_processor(DenseClearProcessor(*grid, window))
        return {"height": stage.height, "width": stage.width}

    how: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 3.5, "generator": generators[0]}
    lower = pipe(**see(LOWER), **how, **common)
    static = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config, use_dynamic_shifting=False)
    refining = FluxImg2ImgPipeline(**{**pipe.components, "scheduler": static})
    refining.vae_scale_factor = pipe.vae_scale_factor
    with torch.no_grad():
        start = official_start(pipe, [picture_of(found, 0)], UPPER.size)
    how = {"num_inference_steps": 4, "strength": 0.5, "guidance_scale": 7.5, "generator": generators[1]}
    upper = refining(image=start, **see(UPPER), **how, **common)
    for rank in found:
        assert relative_error(rank[0][0], lower.images) < 1e-4
        assert relative_error(rank[1][0], upper.images) < 1e-4


def test_a_stock_pipeline_on_stripes_is_called_as_ever() -> None:
    """From Python: what diffusers loaded without YaRN and stride draws with both."""
    how: dict[str, Any] = {"prompt": PROMPT, "max_sequence_length": TEXT, "height": 66 * TOKEN, "width": TOKEN}
    pictures = []
    for pipe in (make_ultraflux(), make_official()):
        handle = clear_dist.parallelize(pipe, window="full") if not pictures else None
        generator = torch.Generator().manual_seed(1)
        pictures.append(pipe(**how, num_inference_steps=2, generator=generator, output_type="pt").images)
        if handle is not None:
            handle.undo()
    assert pictures[0].shape[2:] == (66 * TOKEN, TOKEN)
    torch.testing.assert_close(*pictures, atol=1e-4, rtol=0)


@pytest.mark.parametrize("refinement", ["sdedit", "imax"])
def test_above_the_native_size_only_a_way_of_refining_has_its_own(refinement: str) -> None:
    pipe = make_ultraflux()
    clear_dist.parallelize(pipe, window=4)
    stage = Stage(height=132 * TOKEN, width=128 * TOKEN, sampling=Upscaling(steps=2, refinement=refinement))
    found = extrapolation_of(stage, require_striped(pipe), adapter_of(pipe), is_alone=True)
    shifted = Extrapolation(native_tokens=128**2, sharpens=False, shifts=True, text_block=128)
    assert found == (shifted if refinement == "imax" else None)
    assert attention_scale(found, head_dim=16, text_tokens=8, image_tokens=132 * 128) is None


def test_python_refuses_other_positions() -> None:
    pipe = make_ultraflux()
    clear_dist.parallelize(pipe, window="full")
    for changed in ({"ntk": "clipped"}, {"interpolate_positions": True}):
        with pytest.raises(ValueError, match="upscaling must leave positions with YaRN alone, got ntk="):
            clear_dist.generate(pipe, PROMPT, height=128, width=128, base_resolution=64, upscaling=Upscaling(**changed))


def settled(model: Path, **given: Any) -> tuple[Request, ModelFacts, tuple[str, ...]]:
    return settle(GenerateFlags(model=str(model), device="cpu", **given), Place(), CARDS)


def test_a_folder_is_read_as_it_is_meant(folder: Path) -> None:
    request, facts, _ = settled(folder)
    assert (request.token_size, request.unit, facts.has_yarn) == (TOKEN, TOKEN, True)
    assert [stage.size for stage in request.stages] == [(4096, 4096)]
    assert (request.sampling.steps, request.sampling.guidance_scale) == (50, 4.0)
    request, _, _ = settled(folder, res=8192)
    assert [stage.size for stage in request.stages] == [(4096, 4096), (8192, 8192)]
    upper = request.stages[1].sampling
    assert isinstance(upper, Upscaling)
    assert (upper.ntk_factor, upper.guidance_scale, upper.ntk) == (1.0, 4.0, "plain")
    assert CARDS.cards[0].vae_strides == (1, 2)


def test_a_folder_is_loaded_as_it_is_meant(folder: Path) -> None:
    """Also where its index says nothing of the VAE, which its makers load apart."""
    index = json.loads((folder / "model_index.json").read_text())
    for listed in (index, {name: part for name, part in index.items() if name != "vae"}):
        (folder / "model_index.json").write_text(json.dumps(listed))
        settled(folder, res=64)
        how: dict[str, Any] = {"dtype": torch.float32, "device": torch.device("cpu"), "with_text_encoders": True}
        pipe = load_pipeline(folder, CARDS.cards[0], **how)
        assert pipe.scheduler.config.use_dynamic_shifting is False and pipe.scheduler.shift == 3.0
        assert (pipe.vae_scale_factor, adapter_of(pipe).token_size) == (16, TOKEN)
        assert adapter_of(pipe).native_size == 4096


def run(command: str, *arguments: str) -> int:
    with pytest.raises(SystemExit) as ending:
        main([command, *arguments])
    return int(ending.value.code or 0)


def test_the_command_line_draws_and_plans(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    size = "--model", str(folder), "--height", "2112", "--width", "64", "--steps", "2", "--nproc", "2"
    assert run("generate", "a hill", *size, "--device", "cpu", "--output", "hill.png", "--preview-every", "2") == 0
    assert Image.open("hill.png").size == (64, 2112)
    assert {Image.open(file).size for file in tmp_path.glob("*preview*")} == {(32, 512)}
    capsys.readouterr()
    assert run("plan", *size, "--gpu", "h100", "--json") == 0
    assert json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"res": 80}, r"--res must be a multiple of 32 pixels \(one token\), got 80; nearest: 64 or 96"),
        ({"ntk": "clipped"}, r"--ntk is for models without YaRN, got clipped for model, .*; nearest: without --ntk$"),
        ({"ntk_factor": 4.0}, r"--ntk-factor is for models without YaRN, got 4\.0 .*; nearest: without --ntk-factor"),
    ],
)
def test_wrong_requests_are_refused_in_a_line(folder: Path, given: dict[str, Any], message: str) -> None:
    with pytest.raises(Refusal, match=message):
        settled(folder, **given)


def test_what_is_made_for_other_positions_is_refused(folder: Path, tmp_path: Path) -> None:
    make_tiny_controlnet().save_pretrained(tmp_path / "net")
    Image.new("RGB", (64, 64)).save(tmp_path / "x.png")
    with pytest.raises(Refusal, match=r"its positions must be those of YaRN, got FLUX\.1's"):
        settled(folder, res=64, controlnet=str(tmp_path / "net"), control_image=tmp_path / "x.png")
    recipe = Recipe(model=str(folder), output=tmp_path / "out", data=tmp_path, device="cpu", res=64)
    with pytest.raises(
        Refusal, match="distill is for models without YaRN, got model; nearest: --model black-forest-labs/"
    ):
        distill.settled(recipe, Place())


def test_a_token_s_size_is_known_once_a_hub_s_files_are_here(folder: Path) -> None:
    request, _, _ = settle(GenerateFlags(model="someone/like-ultraflux", device="cpu", height=1040), Place(), CARDS)
    assert request.token_size == 16
    with pytest.raises(Refusal, match=r"--height must be a multiple of 32 pixels \(one token\), got 1040"):
        located(request, folder, None, (), CARDS)


def test_a_stride_goes_without_yarn_and_others_are_refused(tmp_path: Path) -> None:
    model = make_tiny_flux(tmp_path / "model")
    file = model / "vae" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"stride": 2}))
    request, facts, _ = settled(model)
    assert (request.token_size, facts.native_size, facts.has_yarn, request.upscaling.ntk_factor) == (32, 128, False, 10)
    for stride in (3, "two", None):
        file.write_text(json.dumps(json.loads(file.read_text()) | {"stride": stride}))
        message = r"the VAE must be diffusers' AutoencoderKL, got a stride of .* in .*vae; nearest: 2"
        with pytest.raises(Refusal, match=message):
            settled(model)


def refined(group: Group) -> torch.Tensor | None:
    """I-Max's latents of a stage above the native size."""
    pipe = make_ultraflux()
    clear_dist.parallelize(pipe, group=group, window="full")
    with mock.patch.object(pipeline, "YARN_NATIVE_TOKENS", NATIVE):
        given = encode_prompts(
            adapter_of(pipe), group, require_striped(pipe).counters, [PROMPT], max_sequence_length=TEXT
        )
        stages = LOWER, replace(UPPER, sampling=Upscaling(steps=2, refinement="imax"))
        return list(Cascade(pipe, given, seed=SEED).run(stages))[-1].latents


def test_shifted_patches_and_copies_of_the_text_go_with_yarn() -> None:
    (alone,), pair = run_ranks(refined, 1), run_ranks(refined, 2)
    for latents in pair:
        assert relative_error(latents, alone) < 5e-4  # a byte between stages may become either of two
