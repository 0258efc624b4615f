"""`--resume` from the command to the files: killed, interrupted, started anew by torchrun, refused."""

import os
import random
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from diffusers import FluxPipeline
from PIL import Image

from clear_dist.cli import main
from clear_dist.drawing.checkpoints import NAME
from tests.forked import Forked, forked
from tests.launch.test_ranks import ended
from tests.patience import PATIENCE
from tests.tiny import make_clear_weights, make_tiny_flux

ROOT = Path(__file__).parents[2]
QUICK = (
    "--device", "cpu", "--max-sequence-length", "16", "--quiet", "--res", "128", "--steps", "8", "--upscale-steps", "6",
    "--strength", "0.6", "--text-attention", "exact",
)  # fmt: skip
FOLDER = Path("clear-dist.png.resume")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_tiny_flux(tmp_path_factory.mktemp("model"), sample_size=64)
    make_clear_weights(FluxPipeline.from_pretrained(folder).transformer, folder / "clear_local_2.safetensors")
    return folder


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def start(model: Path, *arguments: str) -> Forked:
    return forked(partial(main, ["generate", "a fox", "--model", str(model), *QUICK, *arguments]))


def run(model: Path, *arguments: str) -> tuple[int | None, str, str]:
    """Exit status and what was said."""
    process = start(model, *arguments)
    said = process.communicate()
    return process.returncode, *said


def places() -> list[tuple[int, int]]:
    """Stage and step of the checkpoints that are there."""
    names = [NAME.fullmatch(name) for name in (os.listdir(FOLDER) if FOLDER.exists() else ())]
    return sorted((int(name[1]), int(name[2])) for name in names if name is not None)


def wait_for(place: tuple[int, int], running: Forked | subprocess.Popen[str]) -> list[int]:
    """Processes of its ranks, once it has got so far, and a moment further."""
    deadline = time.monotonic() + 120 * PATIENCE
    while max(places(), default=(0, 0)) < place:
        assert time.monotonic() < deadline
        time.sleep(0.002)
    time.sleep(random.uniform(0, 0.2))
    children = Path(f"/proc/{running.pid}/task/{running.pid}/children").read_text().split()
    return [int(pid) for pid in children]


def test_a_rank_that_is_killed_at_any_moment_loses_nothing(model: Path, here: Path) -> None:
    """The launcher, or either rank, early, late, and between stages: the picture is the undisturbed one, all else gone."""
    every = ("--seed", "5", "--nproc", "2", "--checkpoint-every")
    assert run(model, *every[:-1], "--output", "whole.png")[0] == 0
    for place in ((1, random.randint(1, 6)), (1, 8), (2, random.randint(0, 4))):
        process = start(model, *every, "1", "--resume")
        ranks = wait_for(place, process)
        os.kill(random.choice([process.pid, *ranks]), signal.SIGKILL)
        process.communicate()
        assert process.returncode in (1, -signal.SIGKILL) and ended(ranks)
        status, _, errors = run(model, *every, "1", "--resume")
        assert status == 0, errors
        assert "going on after step" in errors or "going on with stage 2" in errors
        assert Path("clear-dist.png").read_bytes() == Path("whole.png").read_bytes(), place
        assert sorted(os.listdir(here)) == ["clear-dist.png", "whole.png"]
        assert "skipped: 1 of 1 prompts" in run(model, *every, "1", "--resume")[2]
        Path("clear-dist.png").unlink()


@pytest.mark.parametrize(("number", "nproc"), [(signal.SIGINT, 1), (signal.SIGTERM, 1), (signal.SIGTERM, 2)])
def test_who_is_asked_to_end_leaves_a_checkpoint(model: Path, here: Path, number: int, nproc: int) -> None:
    """Of the step under way, with the seed that was drawn; another number of ranks goes on from it."""
    flags = ("--checkpoint-every", "3", "--resume", "--steps", "16")
    process = start(model, *flags, "--nproc", str(nproc))
    wait_for((1, 3), process)
    os.kill(process.pid, number)
    _, errors = process.communicate()
    stage, step = places()[-1]
    assert (process.returncode, stage) == (130, 1) and step < 16
    assert [line for line in errors.splitlines() if "cascade" not in line and "warning" not in line] == [
        f"clear-dist: stopped after step {step}; the same command goes on from {FOLDER.resolve()}",
        "clear-dist: interrupted",
    ]
    status, output, errors = run(model, *flags, "--nproc", str(3 - nproc))
    assert status == 0 and f"going on after step {step} of stage {stage}, from" in errors
    seed = output.split("seed=")[1].split()[0]
    assert run(model, "--steps", "16", "--seed", seed, "--output", "whole.png")[0] == 0
    pictures = [np.asarray(Image.open(name), int) for name in ("clear-dist.png", "whole.png")]
    assert np.abs(pictures[0] - pictures[1]).max() <= 2


def test_torchrun_starts_a_lost_rank_anew(model: Path, here: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [str(ROOT / "clear-dist"), "generate", "a fox", "--model", str(model), *QUICK, "--seed", "5"]
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    flags = ["--resume", "--checkpoint-every", "1"]
    restarting = [*torchrun, "--max-restarts", "1", "--", *command, *flags]
    with Path("said.txt").open("w") as said:
        process = subprocess.Popen(restarting, env=environment, stdout=said, stderr=said, text=True)
        os.kill(random.choice(wait_for((1, 3), process)), signal.SIGKILL)
        assert process.wait() == 0, Path("said.txt").read_text()
    assert "going on after step" in Path("said.txt").read_text()
    assert run(model, "--seed", "5", "--nproc", "2", "--output", "whole.png")[0] == 0
    assert Path("clear-dist.png").read_bytes() == Path("whole.png").read_bytes()
    assert sorted(os.listdir(here)) == ["clear-dist.png", "said.txt", "whole.png"]


def test_slurm_puts_a_job_whose_time_is_over_back_into_the_queue(model: Path, here: Path) -> None:
    """Slurm's commands are stand-ins; it asks the batch script to end, which asks srun, torchrun and the ranks."""
    for name, body in {
        "scontrol": f'[ "$1" = requeue ] && echo "$2" > {here}/requeued || echo localhost',
        "srun": 'shift; exec "$@"',
    }.items():
        (here / name).write_text(f"#!/bin/sh\n{body}\n")
        (here / name).chmod(0o755)
    job = {"SLURM_JOB_ID": "71", "SLURM_JOB_NODELIST": "localhost", "SLURM_JOB_NUM_NODES": "1", "RANKS": "2"}
    path = f"{here}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | job | {"PATH": path, "CLEAR_DIST_ROOT": str(ROOT)}
    given = ["a fox", "--model", str(model), *QUICK, "--seed", "5", "--resume", "--checkpoint-every", "1"]
    command = ["bash", str(ROOT / "launchers" / "slurm.sbatch"), *given]
    with Path("said.txt").open("w") as said:
        first = subprocess.Popen(command, env=environment, stdout=said, stderr=said)
        wait_for((1, 2), first)
        first.terminate()
        assert first.wait() != 0 and Path("requeued").read_text() == "71\n", Path("said.txt").read_text()
        assert places()
        assert subprocess.run(command, env=environment, stdout=said, stderr=said).returncode == 0
    assert "going on after step" in Path("said.txt").read_text()
    assert Path("clear-dist.png").exists() and not FOLDER.exists()


def test_checkpoints_of_another_picture_are_refused_by_name(model: Path, here: Path) -> None:
    flags = ("--resume", "--checkpoint-every", "1", "--seed", "5", "--schedule", "stale", "--warmup-steps", "1")
    process = start(model, *flags, "--nproc", "2")
    wait_for((1, 3), process)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    before = {file.name: file.read_bytes() for file in FOLDER.iterdir()}
    path = FOLDER.resolve()
    others = {
        ("--seed", "6"): "seed 5, got 6",
        ("--steps", "9"): "sampling.steps 8, got 9",
        ("--res", "192"): "height 128, got 192",
        ("--window", "3", "--clear-weights", "none"): "window 2, got 3",
        ("--negative-prompt", "fog"): "negative_prompt None, got fog",
    }
    for given, difference in others.items():
        status, _, errors = run(model, *flags, *given, "--nproc", "2")
        assert (status, errors.splitlines()[-1]) == (
            2,
            f"clear-dist: {path} has checkpoints of another picture: {difference}; "
            f"nearest: --no-resume, or delete {path.name}",
        )
    weights = model / "transformer" / "diffusion_pytorch_model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[:-4] + b"\0\0\0\0")  # the last tensor is small
    try:
        errors = run(model, *flags, "--nproc", "2")[2]
    finally:
        weights.write_bytes(data)
    assert "has checkpoints of another picture: weights_of_model" in errors
    assert {file.name: file.read_bytes() for file in FOLDER.iterdir()} == before
    errors = run(model, *flags, "--nproc", "2")[2]
    assert "; its next step is synchronous" in errors
    assert os.listdir(here) == ["clear-dist.png"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--checkpoint-every", "3"), "--checkpoint-every is for --resume, got 3 alone; nearest: --resume"),
        (("--resume", "--no-metadata"), "--resume cannot be combined with --no-metadata, got both; leave one out"),
        (("--resume", "--profile", "x.json"), "--resume cannot be combined with --profile, got both; leave one out"),
    ],
)
def test_flags_that_have_no_effect_are_refused(
    model: Path, here: Path, flags: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ending:
        main(["generate", "--model", str(model), *flags])
    assert (ending.value.code, capsys.readouterr().err) == (2, f"clear-dist: {message}\n")
