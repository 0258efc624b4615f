"""What a run of `clear-dist distill` finds that another one left: its checkpoint, whole or not, its lock, its sheets."""

import random
import shutil
import time
from functools import partial
from os import environ, kill
from pathlib import Path
from signal import SIGKILL

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from clear_dist.cli import main
from clear_dist.request.outputs import claimed
from tests.commands.test_distill import QUICK, SIZE, distill, here, model, rows
from tests.forked import Forked, forked
from tests.patience import PATIENCE

__all__ = ["here", "model"]


def with_home(home: str, arguments: list[str]) -> None:
    environ["XDG_CACHE_HOME"] = home
    main(arguments)


def start(model: Path, *arguments: str) -> Forked:
    """The command in a process of its own."""
    given = ["distill", "--model", str(model), "--data", "data", *QUICK, *arguments]
    return forked(partial(with_home, str(Path("home").absolute()), given))


def test_a_run_that_was_killed_goes_on_bit_for_bit(model: Path, here: Path) -> None:
    common = ("--checkpointing-steps", "7", "--steps", "60", "--batch-size", "2", "--down-factor", "2")
    when, killed = random.randint(8, 40), start(model, *common)
    deadline = time.monotonic() + 60 * PATIENCE
    while not Path("distilled/losses.csv").exists() or len(rows()) < when:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    kill(killed.pid, SIGKILL)
    killed.communicate()
    assert killed.returncode == -SIGKILL
    assert not Path("distilled/clear_local_2_down_2.safetensors").exists() or len(rows()) < 60
    for arguments in (common, (*common, "--output", "whole")):
        resumed = start(model, *arguments)
        said = resumed.communicate()
        assert resumed.returncode == 0, said
        assert ("going on from distilled/checkpoint-" in said[1]) == (arguments is common)
    results = [load_file(f"{folder}/clear_local_2_down_2.safetensors") for folder in ("distilled", "whole")]
    assert all(torch.equal(results[0][name], tensor) for name, tensor in results[1].items())
    states = [torch.load(f"{folder}/checkpoint-60/state.rank0.pt") for folder in ("distilled", "whole")]
    assert all(torch.equal(a, b) for a, b in zip(states[0]["masters"], states[1]["masters"], strict=True))
    assert [row["step"] for row in rows()] == [str(step) for step in range(1, 61)]


def test_a_checkpoint_that_is_cut_off_is_named_and_the_one_before(
    model: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert distill(model, "--steps", "1") == 0
    shutil.copytree("distilled/checkpoint-1", "earlier")
    assert distill(model, "--steps", "2") == 0
    state = Path("distilled/checkpoint-2/state.rank0.pt")
    whole = state.read_bytes()
    for size, earlier in ((0, False), (1000, False), (len(whole) - 1000, True)):
        if earlier:
            shutil.copytree("earlier", "distilled/checkpoint-1")
        state.write_bytes(whole[:size])
        capsys.readouterr()
        assert distill(model, "--steps", "3") == 2
        told = capsys.readouterr().err.splitlines()[-1]
        goes_on = "it goes on from distilled/checkpoint-1" if earlier else "the run begins anew"
        assert told.startswith(f"clear-dist: {state} is cut off or damaged (")
        assert told.endswith(f"; nearest: delete distilled/checkpoint-2, and {goes_on}")
    shutil.rmtree("distilled/checkpoint-2")
    assert distill(model, "--steps", "2") == 0
    assert Path("distilled/checkpoint-2/state.rank0.pt").read_bytes() == whole


def test_a_second_run_into_the_same_folder_is_refused(model: Path, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(here / "home"))
    with claimed([Path("distilled")]) as taken:
        assert taken is None
        second = start(model, "--steps", "1", "--nproc", "2")
        _, told = second.communicate()
    line = "two running jobs cannot write the same file or folder, got distilled; nearest: distilled-new"
    assert (second.returncode, told) == (2, f"clear-dist: {line}\n")
    assert not Path("distilled").exists()


def test_sheets_show_the_prompts_of_a_file(model: Path, here: Path) -> None:
    prompts = Path("shown.txt")
    common = ("--held-out", "1", "--validation-steps", "1", "--validation-prompts", "shown.txt")
    first = "a fox, number 2\na fox, number 0\n"  # the one that is held out, and another
    for step, text in enumerate(("a fox, number 2\n", first, "a wolf\n", None), 1):
        if text is not None:
            prompts.write_text(text)
        arguments = common if text is not None else common[:4]
        assert distill(model, *arguments, "--steps", str(step)) == 0
    sheets = [np.array(Image.open(f"distilled/samples/step_{step:06}.png")) for step in range(1, 5)]
    assert [sheet.shape[1] for sheet in sheets] == [SIZE, 2 * SIZE, SIZE, SIZE]
    teachers = [sheet[:SIZE, :SIZE] for sheet in sheets]  # of seed 0 each
    assert (teachers[0] == teachers[3]).all() and (teachers[0] != teachers[2]).any()
