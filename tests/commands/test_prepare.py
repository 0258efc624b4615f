"""Prompts are encoded before the rest of the model is loaded, and to the same numbers as with all of it there."""

import gc
import json
from functools import partial
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file
from transformers import T5EncoderModel

from clear_dist.cli import main
from clear_dist.commands import prepare
from clear_dist.plan.choice import Fewer
from clear_dist.weights import loading
from tests.forked import forked
from tests.tiny import make_tiny_flux

QUICK = ("--res", "64", "--steps", "1", "--seed", "5", "--device", "cpu", "--max-sequence-length", "16")
GUIDED = ("--negative-prompt", "dogs", "--true-cfg-scale", "3", "--num-images", "2")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_flux(tmp_path_factory.mktemp("model"))


def encoders() -> int:
    gc.collect()
    return sum(type(found) is T5EncoderModel for found in gc.get_objects())


@pytest.fixture
def alive(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Text encoders in memory whenever the rest of a model is about to be loaded, and when it has been."""
    counted, load, before = [], loading.load_pipeline, encoders()

    def counting(*args: object, **options: object) -> object:
        counted.append(encoders() - before)
        pipe = load(*args, **options)  # type: ignore[arg-type]
        counted.append(encoders() - before)
        return pipe

    monkeypatch.setattr(loading, "load_pipeline", counting)
    return counted


def generate(model: Path, name: str, *flags: str) -> torch.Tensor:
    files = ("--output", f"{name}.png", "--latents-out", f"{name}.safetensors", "--report", f"{name}.json")
    Path("prompts.txt").write_text("a red fox\ntwo dogs\n")
    with pytest.raises(SystemExit) as ending:
        main(["generate", "--model", str(model), "--prompts", "prompts.txt", *QUICK, *GUIDED, *files, *flags])
    assert not ending.value.code
    return load_file(f"{name}.safetensors")["latents"]


def test_text_encoders_are_gone_before_the_rest_is_loaded(
    model: Path, alive: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ahead = generate(model, "ahead")
    assert alive == [0, 0]
    kept = generate(model, "kept", "--keep_text_encoder")
    assert alive[2:] == [0, 1]
    assert len(ahead) == 4 and torch.equal(ahead, kept)
    reports = {name: json.loads(Path(f"{name}.json").read_text()) for name in ("ahead", "kept")}
    parts = ["text_encoder", "text_encoder_2", "transformer", "vae"]
    for told in reports.values():
        assert [part["name"] for part in told["loading"]["parts"]] == parts
        part = told["loading"]["parts"][2]
        assert part["bytes"] == (model / "transformer/diffusion_pytorch_model.safetensors").stat().st_size
        assert part["gigabytes_per_second"] == pytest.approx(part["bytes"] / 1e9 / part["seconds"])
        assert 0 < part["seconds"] < told["seconds"]["load"]
        assert told["seconds"]["text"] > 0
        assert told["loading"]["peak_memory_bytes"][0] > 50_000_000
    assert [reports[name]["settings"]["keep_text_encoder"] for name in ("ahead", "kept")] == [False, True]


def test_what_is_cut_off_of_long_prompts_is_said(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    long = ("abcdefghij klmn", "--negative-prompt", "abcdefghij opqr", "--true-cfg-scale", "2")
    with pytest.raises(SystemExit) as ending:
        main(["generate", "--model", str(model), *long, *QUICK])
    assert not ending.value.code
    told = [line.partition("warning: ")[2] for line in capsys.readouterr().err.splitlines() if "T5" in line]
    words = "is longer than the 16 tokens that T5 takes here; cut off:"
    assert told == [f"the negative prompt {words} 'r'", f"the prompt {words} 'n'"]


def test_what_this_machine_lacks_is_refused_before_anything_is_loaded(
    model: Path, alive: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ending:
        main(["generate", "--model", str(model), *QUICK, "--attention-backend", "flash"])
    assert ending.value.code == 2
    assert "flash cannot run: it runs on cuda, got cpu; nearest: tiled" in capsys.readouterr().err
    assert alive == []


def on_fewer_ranks(model: Path) -> None:
    """A plan on a CPU knows no times: what one might choose is given."""
    fewer = (Fewer(size=(64, 64), ranks=1, most=2, seconds=1.0, on_most=2.0),)
    with (
        patch.object(prepare, "may_use_fewer", lambda request: True),
        patch.object(prepare.fit_here, "chosen_here", lambda *_: (None, fewer)),
    ):
        generate(model, "few", "--nproc", "2")


def test_a_stage_on_fewer_ranks_is_told_and_reported(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    process = forked(partial(on_fewer_ranks, model))
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    alone = generate(model, "alone")
    assert torch.equal(load_file("few.safetensors")["latents"], alone)
    stages = [json.loads(Path(f"{name}.json").read_text())["stages"][0] for name in ("few", "alone")]
    words = "64x64 is drawn by 1 of 2 ranks, in 1 s by the plan where all take 2"
    assert [(stage["ranks"], stage["stripes"]) for stage in stages] == [(1, [[0, 4]])] * 2
    assert stages[0]["why_fewer_ranks"].startswith(words) and stages[1]["why_fewer_ranks"] is None
    assert errors.count(words) == 1
