"""What distilled files give a model: renders, full attention, a window before and after; an interrupted run goes on."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.fidelity import distilled
from clear_dist import demo
from clear_dist.demo.data import HELD_OUT_SEED
from clear_dist.demo.grammar import random_landscape
from clear_dist.demo.renderer import render
from clear_dist.evaluate.attributes import accuracy

SIDE, COUNT = 64, 2


def test_ways_are_drawn_once_and_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = ["--prompts", str(COUNT), "--res", str(SIDE), "--steps", "1", "--results", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["benchmarks/fidelity/distilled.py", str(demo.CLEAR_WEIGHTS), *settings])
    distilled.main()
    found = json.loads((tmp_path / "distilled.json").read_text())["rows"]
    assert [row["name"] for row in found] == ["renderer", "full", "r = 8 before", "clear_local_8"]

    seeds = [HELD_OUT_SEED + index for index in range(COUNT)]
    scenes = [random_landscape(np.random.default_rng(seed)) for seed in seeds]
    renders = np.stack([render(words, seed, SIDE, SIDE) for words, seed in zip(scenes, seeds, strict=True)])
    prompts = distilled.held_out_prompts(COUNT)
    assert accuracy(torch.from_numpy(renders), prompts)["all"] == found[0]["all"]
    assert {word for row in found[2:] for word in row} - set(found[0]) == {"psnr_to_full"}

    kept = tmp_path / "drawn/full/00000.npy"
    np.save(kept, renders)  # what is there is not drawn again
    distilled.main()
    again = json.loads((tmp_path / "distilled.json").read_text())["rows"]
    assert again[1]["all"] == found[0]["all"]
    assert (tmp_path / "distilled.md").read_text().count("\n| ") == len(found) + 1


def test_other_settings_are_refused_in_a_folder_of_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "settings.json").write_text('{"steps": 3}')
    monkeypatch.setattr(sys, "argv", ["benchmarks/fidelity/distilled.py", "--results", str(tmp_path)])
    with pytest.raises(SystemExit):
        distilled.main()
    assert "holds results with steps 3, got 20; nearest: 3, or another folder" in capsys.readouterr().err
