"""Data and guidance ranks from the command line: pictures, names, seeds and report of one rank."""

import json
from functools import partial
from itertools import pairwise
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from clear_dist.cli import main
from clear_dist.commands.render import Rendering
from clear_dist.drawing.drawn import Drawing
from clear_dist.geometry import Rows
from tests.forked import forked
from tests.test_parallelize import relative_error
from tests.tiny import make_tiny_flux

GIVEN = (
    "--prompts", "prompts.txt", "--num-images", "3", "--res", "64", "--steps", "3", "--seed", "5", "--device", "cpu",
    "--max-sequence-length", "16", "--negative-prompt", "dogs", "--true-cfg-scale", "3", "--quiet",
)  # fmt: skip
SHARED = ("--nproc", "4", "--data-ranks", "2", "--guidance-ranks", "2")


def generate(model: Path, name: str, *flags: str) -> None:
    files = ("--output", f"{name}.png", "--latents-out", f"{name}.safetensors", "--report", f"{name}.json")
    main(["generate", "--model", str(model), *GIVEN, *files, *flags])


def test_groups_draw_the_pictures_of_one_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Three prompts of three pictures for two groups: the second prompt's are drawn by both."""
    monkeypatch.chdir(tmp_path)
    model = make_tiny_flux(tmp_path / "model")
    Path("prompts.txt").write_text("a red fox\ntwo dogs\na hill\n")
    shared = forked(partial(generate, model, "shared", *SHARED))
    with pytest.raises(SystemExit) as ending:
        generate(model, "alone")
    assert not ending.value.code
    printed, errors = shared.communicate()
    assert shared.returncode == 0, errors
    one, several = (load_file(f"{name}.safetensors")["latents"] for name in ("alone", "shared"))
    assert len(one) == 9 and relative_error(several, one) < 1e-4
    assert all(relative_error(mine, other) > 0.1 for mine, other in pairwise(one))
    told = [line.partition(" size=") for line in sorted(printed.splitlines())]
    alone = [line.partition(" size=") for line in sorted(capsys.readouterr().out.splitlines())]
    assert [output for output, *_ in told] == [output.replace("alone", "shared") for output, *_ in alone]
    assert all("ranks=2" in figures for *_, figures in told)
    for index in range(9):
        pictures = [picture(f"{name}-{index}.png") for name in ("alone", "shared")]
        assert (pictures[0][0] - pictures[1][0]).abs().max() <= 1
        assert pictures[0][1:] == pictures[1][1:]
    report = json.loads(Path("shared.json").read_text())
    stages = [(stage["data_rank"], stage["guidance_ranks"], stage["ranks"]) for stage in report["stages"]]
    assert stages == [(0, 2, 2), (0, 2, 2), (1, 2, 2), (1, 2, 2)]
    assert report["world_size"] == len(report["comm"]) == len(report["peak_memory_bytes"]) == 4


def picture(file: str) -> tuple[torch.Tensor, str, str, str]:
    """Bytes, prompt, seed and number."""
    with Image.open(file) as image:
        info = image.info
        return torch.from_numpy(np.asarray(image).astype(int)), info["prompt"], info["seed"], info["image"]


def break_in_the_second_group(model: Path) -> None:
    drawn = Rendering._render_prompt

    def breaking(rendering: Rendering, index: int, images: Rows) -> Drawing:
        if rendering.data_rank == 1:
            raise RuntimeError("a group has failed")
        return drawn(rendering, index, images)

    with patch.object(Rendering, "_render_prompt", breaking):
        generate(model, "failing", *SHARED)


def test_a_failure_in_one_group_ends_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = make_tiny_flux(tmp_path / "model")
    Path("prompts.txt").write_text("a red fox\ntwo dogs\na hill\n")
    failing = forked(partial(break_in_the_second_group, model))
    _, errors = failing.communicate()
    assert failing.returncode == 1
    assert errors.count("RuntimeError: a group has failed") == 1
