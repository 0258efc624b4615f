"""Checks before anything is loaded: models, CLEAR weights, sizes, ranks, outputs, and what the user is told."""

import os
import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from clear_dist import demo
from clear_dist.cards.clear import radius_of
from clear_dist.cards.folder import find_model, read_folder
from clear_dist.families.cards import CARDS
from clear_dist.families.flux.card import CLEAR_REPOSITORY, FLUX_DEV
from clear_dist.launch.env import Place
from clear_dist.options import Refusal
from clear_dist.request import devices
from clear_dist.request.clear_weights import find_checkpoint
from clear_dist.request.flags import GenerateFlags
from clear_dist.request.settle import located, settle
from tests.cards.test_damaged_models import retensor
from tests.tiny import make_clear_weights, make_tiny_flux, make_tiny_pipeline

ALONE = Place()


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_flux(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "model"))


def test_the_demo_passes_its_own_checks() -> None:
    request, _, lines = settle(GenerateFlags(device="cpu"), ALONE, CARDS)
    assert (request.height, request.width) == (demo.NATIVE_SIZE, demo.NATIVE_SIZE)
    assert request.window == demo.WINDOW
    assert request.clear_weights == str(demo.CLEAR_WEIGHTS)
    assert request.prompts == (demo.DEFAULT_PROMPT,)
    assert [line.split()[0] for line in lines] == ["model:", "prompt:"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"res": 72}, r"--res must be a multiple of 16 pixels .*got 72; nearest: 64 or 80"),
        ({"height": 24}, r"--height must be .* nearest: 16 or 32"),
        ({"nproc": 9}, r"8 rows of tokens can be cut for 1 to 8 ranks, got 9; nearest: 8"),
        ({"nproc": 9, "width": 256}, r"8 rows of tokens can be cut for 1 to 8 ranks, got 9; nearest: 8"),
        ({"nproc": 9, "height": 256, "cut": "columns"}, r"8 columns of tokens .* got 9; nearest: 8"),
        ({"height": 16384, "width": 32768}, r"at most 268435456 pixels.* nearest: 16384 wide"),
        ({"res": 16384, "output": Path("x.webp")}, r"at most 16383 pixels .* nearest: .png"),
        ({"output": Path("x.gif")}, r"--output must end in .png"),
        ({"output": Path("x")}, r"--output must end in .png"),
        ({"output": Path("/")}, r"--output must be a file, got the folder"),
        ({"output": Path("/nowhere/at/all/x.png")}, r"a folder that exists.* nearest: /x.png"),
        ({"output": Path("/proc/x.png")}, r"a folder that can be written to"),
        ({"latents_out": Path("x.pt")}, r"--latents-out must end in .safetensors"),
        ({"report": Path("x.txt")}, r"--report must end in .json, got 'x.txt'; nearest: x.json"),
        ({"profile": Path("x.txt")}, r"--profile must end in .json, .json.gz, got 'x.txt'; nearest: x.json"),
        ({"profile": Path(".json.gz")}, r"got '.json.gz'; nearest: clear-dist.json.gz"),
        (
            {"profile": Path("x.json"), "report": Path("x.rank0.json")},
            r"different files, got x.rank0.json twice; nearest: --report x.rank0-new.json",
        ),
        ({"profile": Path("x.gz")}, r"--profile must end in .json, .json.gz, got 'x.gz'; nearest: x.json.gz"),
        ({"profile": Path("/nowhere/x.json")}, r"--profile must lie in a folder that exists.* nearest: /x.json"),
        ({"profile": Path(f"{'x' * 248}.json")}, r"--profile must be a file that can be written, .* of 259 bytes"),
        ({"profile": Path("x.json"), "report": Path("x.rank0.json")}, r"different files, got x.rank0.json twice"),
        ({"base_res": 72}, r"--base-res must be a multiple of 16"),
        ({"base_res": 256}, r"--base-res must be at most the final 128 px, got 256; nearest: 128"),
        ({"prompts": Path("/nowhere")}, r"--prompts must be a text file"),
        ({"clear_weights": "nowhere.safetensors"}, r"there is no nowhere.safetensors"),
        ({"clear_weights": "a:b"}, r"must be owner/name:file"),
        ({"text_attention": "average"}, r"must be exact where the window is full"),
        ({"output": Path(f"{'x' * 252}.png")}, r"must be a file that can be written, .* of 256 bytes .*clear-dist.png"),
        ({"output": Path(f"{'x' * 251}.png"), "num_images": 2}, r"must be a file that can be written, .* 257 bytes"),
        ({"model": "/" + "x" * 5_000}, r"there is no /xxx.*\.\.\.; nearest"),
        ({"model": f"a/{'x' * 5_000}"}, r"there is no a/xxx"),
        ({"model": "a/b c"}, r"there is no a/b c; nearest"),
        ({"clear_weights": "x" * 5_000}, r"there is no xxx.*\.\.\.; nearest"),
        (
            {"clear_weights": "a/b:clear_local_8_down_3.safetensors"},
            r"^128 x 128 px: the height in tokens must be a multiple of 3, got 8; nearest: 9",
        ),
        ({"window": 4, "model": "huggingface"}, r"there is no huggingface; nearest"),
    ],
)
def test_requests_that_do_not_fit_are_refused(original: Path, given: dict[str, Any], message: str) -> None:
    with pytest.raises(Refusal, match=message):
        settle(GenerateFlags(**({"model": str(original)} | given)), ALONE, CARDS)


def test_gpus_decide_device_dtype_and_ranks(original: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = devices.FoundGpu(name="NVIDIA H100", capability=9.0, total=85 * 10**9, free=84 * 10**9)
    monkeypatch.setattr(devices, "find_gpus", lambda: (found, found))
    monkeypatch.setattr(devices, "why_torch_sees_none", lambda: None)
    request, *_ = settle(GenerateFlags(model=str(original)), ALONE, CARDS)
    assert (request.device, request.dtype, request.world_size) == ("cuda", "bfloat16", 2)


def test_a_full_disk_is_refused(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = 4096 * 4096 * 3 + 1
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    given = GenerateFlags(model=str(original), res=4096, output=tmp_path / "x.png")
    settle(given, ALONE, CARDS)
    with pytest.raises(Refusal, match=r"75 MB free for this request, and has 50 MB; nearest: --output"):
        settle(replace(given, save_stages=True), ALONE, CARDS)


def test_torchruns_world_size_counts(original: Path) -> None:
    place = Place(rank=0, world_size=2, local_world_size=2, launcher="torchrun")
    assert settle(GenerateFlags(model=str(original), nproc=2), place, CARDS)[0].world_size == 2
    with pytest.raises(Refusal, match="got 3; nearest: 2"):
        settle(GenerateFlags(model=str(original), nproc=3), place, CARDS)


def test_clear_weights_are_found_and_checked(folder: Path) -> None:
    facts = read_folder(folder, CARDS)
    assert find_checkpoint("auto", None, facts, CARDS) is None
    transformer = make_tiny_pipeline().transformer
    narrow = make_clear_weights(transformer, folder / "clear_local_2.safetensors")
    wide = make_clear_weights(transformer, folder / "clear_local_16.safetensors")
    assert find_checkpoint("auto", None, facts, CARDS) == str(narrow)
    assert find_checkpoint("auto", 16, facts, CARDS) == find_checkpoint(str(folder), 16, facts, CARDS) == str(wide)
    assert find_checkpoint("auto", "full", facts, CARDS) is find_checkpoint("none", None, facts, CARDS) is None
    request, _, lines = settle(GenerateFlags(model=str(folder), window=3), ALONE, CARDS)
    assert (request.clear_weights, request.window) == (str(narrow), 3)
    assert any("distilled for a window of 2, not 3" in line for line in lines)


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
            r"x.attn.processor.spatial_weight must have the shape \[1, 1, 1, 2, 1, 2, 1\], got \[1\]",
        ),
    ],
)
def test_clear_weights_of_another_model_are_refused(folder: Path, change: Callable[..., object], message: str) -> None:
    file = make_clear_weights(make_tiny_pipeline().transformer, folder / "clear_local_4.safetensors")
    retensor(file, change)
    with pytest.raises(Refusal, match=message):
        find_checkpoint(str(file), None, read_folder(folder, CARDS), CARDS)


def test_clear_weights_for_a_window_and_full_attention_are_said(folder: Path) -> None:
    file = make_clear_weights(make_tiny_pipeline().transformer, folder / "clear_local_4.safetensors")
    config = GenerateFlags(model=str(folder), clear_weights=str(file), window="full")
    assert any("distilled for a window of 4, not for full" in line for line in settle(config, ALONE, CARDS)[2])


def test_a_folder_is_no_checkpoint(folder: Path) -> None:
    (folder / "clear_local_1.safetensors").mkdir()
    assert find_checkpoint("auto", None, read_folder(folder, CARDS), CARDS) is None


def test_official_checkpoints_go_with_flux_by_name() -> None:
    dev = find_model(FLUX_DEV, CARDS, has_cuda=True)
    assert find_checkpoint("auto", None, dev, CARDS) == f"{CLEAR_REPOSITORY}:clear_local_16.safetensors"
    assert find_checkpoint("auto", 8, dev, CARDS) == f"{CLEAR_REPOSITORY}:clear_local_8.safetensors"
    assert radius_of(f"{CLEAR_REPOSITORY}:clear_local_8.safetensors") == 8


def test_a_checkpoint_without_a_radius_needs_a_window(folder: Path) -> None:
    file = make_clear_weights(make_tiny_pipeline().transformer, folder / "mine.safetensors")
    with pytest.raises(Refusal, match="--window must be given"):
        settle(GenerateFlags(model=str(folder), clear_weights=str(file)), ALONE, CARDS)


@pytest.mark.parametrize(
    ("given", "part"),
    [
        ({}, "window: full"),
        ({"window": 4}, "window 4 without CLEAR weights draws noise"),
        ({"negative_prompt": "x"}, "--negative-prompt has no effect without"),
        ({"true_cfg_scale": 3.0}, "--true-cfg-scale has no effect without"),
        ({"revision": "main"}, "--revision has no effect"),
        ({"window": 4, "text_attention": "exact"}, "--text-attention has no effect on one rank"),
        ({"text_tokens": "sharded"}, "--text-tokens has no effect on one rank"),
        ({"res": 1024, "cascade": "off"}, "1024 px in one stage is far above the model's 128"),
        ({"res": 512, "strength": 0.5, "steps": 8}, "cascade: 128x128 -> 256x256 -> 512x512 (4 steps at strength 0.5"),
        ({"upscale_steps": 2}, "--upscale-steps has no effect: this size is drawn in one stage"),
        ({"res": 256, "cascade": "off", "save_stages": True}, "--save-stages has no effect"),
        ({"warmup_steps": 2}, "--warmup-steps has no effect with --schedule sync"),
        ({"schedule": "stale"}, "--schedule stale has no effect on one rank"),
        ({"schedule": "stale", "nproc": 2, "steps": 4}, "--schedule stale has no effect: 4 steps are all warm-up"),
        ({"schedule": "stale", "nproc": 2, "steps": 2, "warmup_steps": 3, "res": 512}, "no effect: 2 steps are all"),
        ({"attention_backend": "tiled"}, "--attention-backend has no effect where the window is full"),
        ({"hoist_modulation": True, "device": "cpu"}, "--hoist-modulation has no effect on a CPU"),
    ],
)
def test_choices_and_flags_without_effect_are_said(original: Path, given: dict[str, Any], part: str) -> None:
    *_, lines = settle(GenerateFlags(model=str(original), **given), ALONE, CARDS)
    assert any(part in line for line in lines), lines


def test_compile_needs_a_compiler(original: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(Refusal, match=r"--compile needs a C\+\+ compiler \(no-such-compiler\) on cpu, got none"):
        settle(GenerateFlags(model=str(original), device="cpu", compile=True), ALONE, CARDS)


def test_float8_needs_a_gpu(original: Path) -> None:
    with pytest.raises(Refusal, match=r"--float8 needs a CUDA GPU of compute capability 8\.9, got cpu; nearest"):
        settle(GenerateFlags(model=str(original), device="cpu", float8=True), ALONE, CARDS)


def test_the_demo_names_words_it_does_not_know() -> None:
    config = GenerateFlags(model="demo", prompt="sunset over hills with an elephant", guidance_scale=2.0)
    request, _, lines = settle(config, ALONE, CARDS)
    assert request.prompts == ("sunset over hills",)
    assert any("'elephant'" in line for line in lines)
    assert any("--guidance-scale has no effect" in line for line in lines)


def test_a_hub_model_is_checked_once_its_files_are_here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "find_gpus", lambda: ())
    request, *_ = settle(GenerateFlags(model="someone/flux-like", clear_weights="none", nproc=9), ALONE, CARDS)
    assert (request.height, request.width) == (None, None)
    with pytest.raises(Refusal, match="got 9; nearest: 8"):
        located(request, folder, None, (), CARDS)


def test_outputs_of_a_hub_model_are_checked_before_it_is_known(tmp_path: Path) -> None:
    config = {"model": "someone/flux-like", "clear_weights": "none", "device": "cpu", "res": 64}
    settle(GenerateFlags(**config, output=tmp_path / "x.png"), ALONE, CARDS)
    with pytest.raises(Refusal, match="--output must lie in a folder that exists"):
        settle(GenerateFlags(**config, output=tmp_path / "nowhere" / "x.png"), ALONE, CARDS)


def test_a_file_of_prompts(original: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    others = "a\vb\fc\x1cd\x1de\x1ef\x85g\u2028h\u2029i"  # where Python's `splitlines` would break, and no editor does
    file.write_bytes(f"one\r\n\r  two \r{others}\n".encode())
    assert settle(GenerateFlags(model=str(original), prompts=file), ALONE, CARDS)[0].prompts == ("one", "two", others)
    file.write_text("\ufeffone\n", encoding="utf-8")
    assert settle(GenerateFlags(model=str(original), prompts=file), ALONE, CARDS)[0].prompts == ("one",)
    file.write_text("\n")
    with pytest.raises(Refusal, match="at least one prompt"):
        settle(GenerateFlags(model=str(original), prompts=file), ALONE, CARDS)


def test_a_pipe_of_prompts_is_read_once(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    config = GenerateFlags(model="demo", device="cpu", prompts=pipe)
    with pytest.raises(Refusal, match="must be a file under torchrun"):
        settle(config, Place(world_size=2, local_world_size=2, launcher="torchrun"), CARDS)
    writer = threading.Thread(target=pipe.write_text, args=("sunset over hills\nan elephant\n",), daemon=True)
    writer.start()
    request, _, lines = settle(config, ALONE, CARDS)
    writer.join()
    assert request.prompts[0] == "sunset over hills" and len(request.prompts) == 2
    assert any("'elephant'" in line for line in lines)


def test_a_numbered_name_that_is_a_folder_is_refused(original: Path, tmp_path: Path) -> None:
    (tmp_path / "x-1.png").mkdir()
    output = tmp_path / "x.png"
    settle(GenerateFlags(model=str(original), output=output), ALONE, CARDS)
    with pytest.raises(Refusal, match=r"got the folder .*x-1\.png"):
        settle(GenerateFlags(model=str(original), output=output, num_images=2), ALONE, CARDS)
