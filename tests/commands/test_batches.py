"""`generate --prompts list.jsonl`: pictures with seeds, sizes, negative prompts and names of their own."""

import json
import os
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clear_dist.cli import main
from clear_dist.commands import saving
from tests.commands.test_stages import full_disk_for, here, model
from tests.forked import forked

__all__ = ["here", "model"]

QUICK = ("--device", "cpu", "--max-sequence-length", "16", "--quiet", "--steps", "2", "--upscale-steps", "1")
GUIDED = ("--true-cfg-scale", "2", "--negative-prompt", "rain", "--text-attention", "exact")
LINES = (
    {"prompt": "a fox", "seed": 3, "size": "96x64", "output": "fox.png"},
    {"prompt": "two dogs", "negative_prompt": "fog"},
    {"prompt": "a hill", "size": 128, "output": "hill.webp"},
)
NAMES = ("fox.png", "clear-dist-1.png", "hill.webp")


def write() -> None:
    Path("list.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in LINES))


def run(model: Path, *arguments: str) -> int:
    """Exit status, of a run in this process."""
    with pytest.raises(SystemExit) as ending:
        main(["generate", "--model", str(model), *QUICK, *GUIDED, *arguments])
    return int(ending.value.code or 0)


def test_each_line_is_as_if_it_were_alone(model: Path, here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write()
    assert run(model, "--prompts", "list.jsonl", "--seed", "5") == 0
    assert sorted(os.listdir(here)) == sorted([*NAMES, "list.jsonl"])
    flags = (("--seed", "3", "--res", "96x64"), ("--negative-prompt", "fog"), ("--res", "128"))
    for line, name, own in zip(LINES, NAMES, flags, strict=True):
        output = f"alone{Path(name).suffix}"
        assert run(model, str(line["prompt"]), "--seed", "5", *own, "--output", output) == 0
        assert Path(name).read_bytes() == Path(output).read_bytes(), name
    capfd.readouterr()
    assert run(model, "--prompts", "list.jsonl", "--seed", "5", "--resume") == 0
    assert "skipped: 3 of 3 prompts, which are there" in capfd.readouterr().err


def test_a_line_that_fails_is_told_at_the_end_and_drawn_by_the_next_run(
    model: Path, here: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The seed is drawn once, for all that have none of their own, and is the same in the next run."""
    write()
    with monkeypatch.context() as patch:
        patch.setattr(saving, "save_picture", full_disk_for("clear-dist-1.png"))
        assert run(model, "--prompts", "list.jsonl", "--resume") == 3
    told = capfd.readouterr()
    assert told.err.splitlines()[-2].startswith("clear-dist: prompt 2, clear-dist-1.png: OSError: [Errno 28] No space")
    assert told.err.splitlines()[-1] == "clear-dist: 1 of 3 prompts failed, as told above; the others are there"
    seed = told.out.split("output=hill.webp seed=")[1].split()[0]
    assert run(model, "--prompts", "list.jsonl", "--resume") == 0
    told = capfd.readouterr()
    assert "skipped: 2 of 3 prompts" in told.err and "going on after step 2 of stage 1" in told.err
    assert told.out.startswith(f"output=clear-dist-1.png seed={seed} ") and told.out.count("output=") == 1
    assert sorted(os.listdir(here)) == sorted([*NAMES, "list.jsonl"])


def test_the_first_that_fails_ends_the_others_where_that_is_asked_for(
    model: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write()
    monkeypatch.setattr(saving, "save_picture", full_disk_for("clear-dist-1.png"))
    assert run(model, "--prompts", "list.jsonl", "--no-keep-going") == 1
    assert sorted(os.listdir(here)) == ["fox.png", "list.jsonl"]


def test_data_ranks_share_the_lines(model: Path, here: Path) -> None:
    write()
    common = ["generate", "--model", str(model), *QUICK, *GUIDED, "--prompts", "list.jsonl", "--seed", "5"]
    process = forked(partial(main, [*common, "--nproc", "2", "--data-ranks", "2", "--resume"]))
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    assert output.count("output=") == 3 and output.count(" ranks=1 ") == 3
    shared = [np.asarray(Image.open(name), int) for name in NAMES]
    assert sorted(os.listdir(here)) == sorted([*NAMES, "list.jsonl"])
    assert run(model, "--prompts", "list.jsonl", "--seed", "5") == 0
    for name, picture in zip(NAMES, shared, strict=True):
        assert np.abs(np.asarray(Image.open(name), int) - picture).max() <= 1, name


def test_sizes_are_for_pictures_from_noise(model: Path, here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write()
    Image.new("RGB", (64, 64)).save("in.png")
    assert run(model, "--prompts", "list.jsonl", "--image", "in.png") == 2
    assert "size in --prompts is for pictures from noise, got one to start from" in capfd.readouterr().err
    Path("list.jsonl").write_text('{"prompt": "x", "size": "100x64"}\n')
    assert run(model, "--prompts", "list.jsonl") == 2
    assert "size in --prompts must be a multiple of 16 pixels" in capfd.readouterr().err
