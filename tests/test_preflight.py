"""Checks before anything is loaded: models, CLEAR weights, sizes, ranks, outputs, and what the user is told."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from clear_dist import demo, preflight
from clear_dist.comm.env import Place
from clear_dist.config import CLEAR_REPOSITORY, FLUX_DEV, FLUX_SCHNELL, GenerateConfig, Refusal
from clear_dist.preflight import clear_weights, devices, model, outputs
from clear_dist.preflight.flux import FluxShape
from tests.tiny import make_clear_weights, make_tiny_flux, make_tiny_pipeline

ALONE = Place()
TRANSFORMER = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_flux(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "model"))


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def retensor(file: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def cut(file: Path, size: int) -> None:
    file.write_bytes(file.read_bytes()[:size])


def split(folder: Path) -> Path:
    """Two files and an index in place of the transformer's one; the second file."""
    whole = folder / TRANSFORMER
    tensors = load_file(whole)
    halves = [dict(list(tensors.items())[::2]), dict(list(tensors.items())[1::2])]
    names = [f"diffusion_pytorch_model-0000{part}-of-00002.safetensors" for part in (1, 2)]
    for name, half in zip(names, halves, strict=True):
        save_file(half, whole.with_name(name))
    weight_map = {key: name for name, half in zip(names, halves, strict=True) for key in half}
    whole.with_name("diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    whole.unlink()
    return whole.with_name(names[1])


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda f: shutil.rmtree(f), "there is no"),
    "empty": (lambda f: (shutil.rmtree(f), f.mkdir()), "empty folder"),
    "no index": (lambda f: (f / "model_index.json").unlink(), "model_index.json"),
    "broken index": (lambda f: (f / "model_index.json").write_text("{"), "must be a JSON file"),
    "another pipeline": (
        lambda f: edit(f / "model_index.json", _class_name="StableDiffusionPipeline"),
        "must be a FluxPipeline, got StableDiffusionPipeline",
    ),
    "another transformer": (
        lambda f: edit(f / "transformer/config.json", _class_name="SD3Transformer2DModel"),
        "must be a FluxTransformer2DModel, got SD3Transformer2DModel",
    ),
    "another use": (lambda f: edit(f / "transformer/config.json", in_channels=384), "must take 64 channels"),
    "no vae": (lambda f: shutil.rmtree(f / "vae"), "must have the folder vae"),
    "no weights": (lambda f: (f / TRANSFORMER).unlink(), f"there is no file .*{TRANSFORMER}"),
    "no text weights": (lambda f: (f / "text_encoder_2/model.safetensors").unlink(), "text_encoder_2"),
    "pickled": (
        lambda f: (f / TRANSFORMER).rename(f / "transformer/diffusion_pytorch_model.bin"),
        "got the pickled file .*diffusion_pytorch_model.bin",
    ),
    "cut in the data": (lambda f: cut(f / TRANSFORMER, -100), "must have .* bytes by its own header"),
    "cut in the header": (lambda f: cut(f / TRANSFORMER, 100), "complete safetensors file"),
    "nothing in it": (lambda f: cut(f / TRANSFORMER, 0), "complete safetensors file"),
    "other contents": (lambda f: (f / TRANSFORMER).write_text("<html>" * 100), "complete safetensors file"),
    "tensor missing": (
        lambda f: retensor(f / TRANSFORMER, lambda t: t.pop("transformer_blocks.0.attn.to_q.weight")),
        "lacks transformer_blocks.0.attn.to_q.weight",
    ),
    "tensor unexpected": (
        lambda f: retensor(f / TRANSFORMER, lambda t: t.update(extra=torch.zeros(1))),
        "has an unexpected tensor extra",
    ),
    "wrong shape": (
        lambda f: retensor(f / TRANSFORMER, lambda t: t.update({"proj_out.bias": torch.zeros(3)})),
        r"proj_out.bias must have the shape \[64\], got \[3\]",
    ),
    "a file of several missing": (lambda f: split(f).unlink(), "there is no file .*00002-of-00002"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_models_are_refused(folder: Path, name: str) -> None:
    damage, message = DAMAGE[name]
    damage(folder)
    with pytest.raises(Refusal, match=message):
        preflight.check(GenerateConfig(model=str(folder)), ALONE)


def test_weights_in_several_files(folder: Path) -> None:
    split(folder)
    assert model.of_folder(folder).token_size == 16


@pytest.mark.parametrize("guidance", [True, False])
def test_every_tensor_of_the_transformer_is_known(guidance: bool) -> None:
    transformer = make_tiny_pipeline(double_blocks=2, single_blocks=3, guidance_embeds=guidance).transformer
    expected = {name: tuple(tensor.shape) for name, tensor in transformer.state_dict().items()}
    assert FluxShape.of(transformer.config).tensors() == expected


def test_defaults_fit_the_model(original: Path, tmp_path: Path) -> None:
    schnell = make_tiny_flux(tmp_path / "schnell", guidance_embeds=False)
    facts = {name: model.find(name, has_cuda=False) for name in (str(original), str(schnell), FLUX_DEV, FLUX_SCHNELL)}
    found = {name: (fact.steps, fact.guidance_scale, fact.max_sequence_length) for name, fact in facts.items()}
    assert found[str(original)] == found[FLUX_DEV] == (28, 3.5, 512)
    assert found[str(schnell)] == found[FLUX_SCHNELL] == (4, 0.0, 256)
    assert facts[str(original)].native_size == 128
    assert model.find("auto", has_cuda=False).is_demo
    assert model.find("auto", has_cuda=True).location == FLUX_DEV


def test_the_demo_passes_its_own_checks() -> None:
    request, lines = preflight.check(GenerateConfig(device="cpu"), ALONE)
    assert (request.height, request.width) == (demo.NATIVE_SIZE, demo.NATIVE_SIZE)
    assert request.window == demo.WINDOW
    assert request.clear_weights == str(demo.CLEAR_WEIGHTS)
    assert request.prompts == (demo.DEFAULT_PROMPT,)
    assert [line.split()[0] for line in lines] == ["model:"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"res": 72}, r"--res must be a multiple of 16 pixels .*got 72; nearest: 64 or 80"),
        ({"height": 24}, r"--height must be .* nearest: 16 or 32"),
        ({"nproc": 9}, r"8 rows of tokens can be cut for 1 to 8 ranks, got 9; nearest: 8"),
        ({"height": 16384, "width": 32768}, r"at most 268435456 pixels.* nearest: 16384 wide"),
        ({"res": 16384, "output": Path("x.webp")}, r"at most 16383 pixels .* nearest: .png"),
        ({"output": Path("x.gif")}, r"--output must end in .png"),
        ({"output": Path("x")}, r"--output must end in .png"),
        ({"output": Path("/")}, r"--output must be a file, got the folder"),
        ({"output": Path("/nowhere/at/all/x.png")}, r"a folder that exists.* nearest: /x.png"),
        ({"output": Path("/proc/x.png")}, r"a folder that can be written to"),
        ({"latents_out": Path("x.pt")}, r"--latents-out must end in .safetensors"),
        ({"report": Path("x.txt")}, r"--report must end in .json, got 'x.txt'; nearest: x.json"),
        ({"prompts": Path("/nowhere")}, r"--prompts must be a text file"),
        ({"clear_weights": "nowhere.safetensors"}, r"there is no nowhere.safetensors"),
        ({"clear_weights": "a:b"}, r"must be owner/name:file"),
        ({"text_attention": "average"}, r"must be exact where the window is full"),
        ({"window": "4", "model": "huggingface"}, r"there is no huggingface; nearest"),
    ],
)
def test_requests_that_do_not_fit_are_refused(original: Path, given: dict[str, Any], message: str) -> None:
    with pytest.raises(Refusal, match=message):
        preflight.check(GenerateConfig(**({"model": str(original)} | given)), ALONE)


def test_cuda_is_refused_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "count_gpus", lambda: 0)
    with pytest.raises(Refusal, match="there is none here; nearest: cpu"):
        preflight.check(GenerateConfig(device="cuda"), ALONE)


def test_gpus_decide_device_dtype_and_ranks(original: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "count_gpus", lambda: 2)
    request, _ = preflight.check(GenerateConfig(model=str(original)), ALONE)
    assert (request.device, request.dtype, request.world_size) == ("cuda", "bfloat16", 2)
    _, lines = preflight.check(GenerateConfig(model=str(original), nproc=4), ALONE)
    assert "4 ranks share 2 GPUs: they exchange through host memory" in lines


def test_a_full_disk_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refusal, match="GB free for this request"):
        outputs.check(tmp_path / "x.png", None, None, pixels=10**15, pictures=1)


def test_torchruns_world_size_counts(original: Path) -> None:
    place = Place(rank=0, world_size=2, local_world_size=2, launcher="torchrun")
    assert preflight.check(GenerateConfig(model=str(original), nproc=2), place)[0].world_size == 2
    with pytest.raises(Refusal, match="got 3; nearest: 2"):
        preflight.check(GenerateConfig(model=str(original), nproc=3), place)


def test_clear_weights_are_found_and_checked(folder: Path) -> None:
    facts = model.of_folder(folder)
    assert clear_weights.find("auto", None, facts) is None
    transformer = make_tiny_pipeline().transformer
    narrow = make_clear_weights(transformer, folder / "clear_local_2.safetensors")
    wide = make_clear_weights(transformer, folder / "clear_local_16.safetensors")
    assert clear_weights.find("auto", None, facts) == str(narrow)
    assert clear_weights.find("auto", 16, facts) == clear_weights.find(str(folder), 16, facts) == str(wide)
    assert clear_weights.find("auto", "full", facts) is clear_weights.find("none", None, facts) is None
    request, lines = preflight.check(GenerateConfig(model=str(folder), clear_weights=str(wide), window="3"), ALONE)
    assert request.window == 3
    assert any("distilled for a window of 16, not 3" in line for line in lines)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.pop("single_transformer_blocks.0.attn.to_k.bias"),
            "lacks single_transformer_blocks.0.attn.to_k.bias",
        ),
        (lambda t: t.update(more=torch.zeros(1)), "unexpected tensor more"),
        (lambda t: t.update({"transformer_blocks.0.attn.to_v.bias": torch.zeros(2)}), r"shape \[32\], got \[2\]"),
        (
            lambda t: t.update({"x.attn.processor.spatial_weight": torch.zeros(1)}),
            "down-sampled keys are not supported",
        ),
    ],
)
def test_clear_weights_of_another_model_are_refused(folder: Path, change: Callable[..., object], message: str) -> None:
    file = make_clear_weights(make_tiny_pipeline().transformer, folder / "clear_local_4.safetensors")
    retensor(file, change)
    with pytest.raises(Refusal, match=message):
        clear_weights.find(str(file), None, model.of_folder(folder))


def test_official_checkpoints_go_with_flux_by_name() -> None:
    dev = model.find(FLUX_DEV, has_cuda=True)
    assert clear_weights.find("auto", None, dev) == f"{CLEAR_REPOSITORY}:clear_local_16.safetensors"
    assert clear_weights.find("auto", 8, dev) == f"{CLEAR_REPOSITORY}:clear_local_8.safetensors"
    assert clear_weights.radius_of(f"{CLEAR_REPOSITORY}:clear_local_8.safetensors") == 8


def test_a_checkpoint_without_a_radius_needs_a_window(folder: Path) -> None:
    file = make_clear_weights(make_tiny_pipeline().transformer, folder / "mine.safetensors")
    with pytest.raises(Refusal, match="--window must be given"):
        preflight.check(GenerateConfig(model=str(folder), clear_weights=str(file)), ALONE)


@pytest.mark.parametrize(
    ("given", "part"),
    [
        ({}, "window: full"),
        ({"window": "4"}, "window 4 without CLEAR weights draws noise"),
        ({"negative_prompt": "x"}, "--negative-prompt has no effect without"),
        ({"true_cfg_scale": 3.0}, "--true-cfg-scale has no effect without"),
        ({"revision": "main"}, "--revision has no effect"),
        ({"window": "4", "text_attention": "exact"}, "--text-attention has no effect on one rank"),
        ({"res": 1024}, "far above the model's 128"),
    ],
)
def test_choices_and_flags_without_effect_are_said(original: Path, given: dict[str, Any], part: str) -> None:
    _, lines = preflight.check(GenerateConfig(model=str(original), **given), ALONE)
    assert any(part in line for line in lines), lines


def test_the_demo_names_words_it_does_not_know() -> None:
    config = GenerateConfig(model="demo", prompt="sunset over hills with an elephant", guidance_scale=2.0)
    request, lines = preflight.check(config, ALONE)
    assert request.prompts == ("sunset over hills",)
    assert any("'elephant'" in line for line in lines)
    assert any("--guidance-scale has no effect" in line for line in lines)


def test_a_hub_model_is_checked_once_its_files_are_here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "count_gpus", lambda: 0)
    request, _ = preflight.check(GenerateConfig(model="someone/flux-like", clear_weights="none", nproc=9), ALONE)
    assert (request.height, request.width) == (None, None)
    with pytest.raises(Refusal, match="got 9; nearest: 8"):
        preflight.located(request, folder, None)


def test_a_file_of_prompts(original: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("one\n\n  two \n")
    assert preflight.check(GenerateConfig(model=str(original), prompts=file), ALONE)[0].prompts == ("one", "two")
    file.write_text("\n")
    with pytest.raises(Refusal, match="at least one prompt"):
        preflight.check(GenerateConfig(model=str(original), prompts=file), ALONE)
