"""`clear-dist generate` where Slurm starts it: `srun` alone, and the batch script, whose `srun` starts torchrun."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from clear_dist.cli import main
from clear_dist.request import outputs
from tests.forked import Forked, forked
from tests.request.test_pictures import here, model

__all__ = ["here", "model"]

ROOT = Path(__file__).parents[2]
QUICK = ("--res", "64", "--steps", "1", "--device", "cpu", "--max-sequence-length", "16", "--window", "full", "--quiet")
STEP = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_NTASKS": "2"}
NODE = {"SLURM_STEP_NODELIST": "localhost", "SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_NODEID": "0"}


def in_slurm(variables: dict[str, str], arguments: tuple[str, ...]) -> None:
    os.environ.update({"CLEAR_DIST_ALONE": "", **variables})  # a command with --nproc in this process leaves it behind
    main(arguments)


def start(model: Path, variables: dict[str, str], *arguments: str) -> Forked:
    given = ("generate", "a fox", "--model", str(model), *QUICK, *arguments)
    return forked(partial(in_slurm, variables, given))


def test_a_step_of_two_tasks_draws_one_picture(model: Path) -> None:
    tasks = [start(model, STEP | NODE | {"SLURM_PROCID": rank, "SLURM_LOCALID": rank}) for rank in "01"]
    (first, errors), (second, silent) = [task.communicate() for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0], errors + silent
    assert " ranks=2 " in first and first.startswith("output=clear-dist.png seed=")
    assert second == ""


def test_a_wrong_request_is_told_by_one_task(model: Path) -> None:
    tasks = [start(model, STEP | NODE | {"SLURM_PROCID": rank, "SLURM_LOCALID": rank}, "--res", "65") for rank in "01"]
    told = [task.communicate()[1] for task in tasks]
    assert [task.returncode for task in tasks] == [2, 2]
    assert told[0].startswith("clear-dist: --res must be a multiple of 16 pixels") and told[1] == ""


@pytest.mark.parametrize(
    ("variables", "flags", "ranks"),
    [
        (STEP | {"SLURM_STEP_NUM_TASKS": "1"}, (), 1),  # an interactive allocation
        (STEP | NODE, ("--nproc", "2"), 2),
    ],
)
def test_a_task_that_has_no_second_one_or_its_own(
    model: Path, variables: dict[str, str], flags: tuple[str, ...], ranks: int
) -> None:
    task = start(model, variables | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0"}, *flags)
    told, errors = task.communicate()
    assert task.returncode == 0, errors
    assert f" ranks={ranks} " in told


def test_the_batch_script_starts_torchrun_which_runs_the_file_of_a_checkout(model: Path, here: Path) -> None:
    for name, body in {
        "scontrol": "echo localhost",
        "srun": '[ "$1" = --kill-on-bad-exit=1 ] && shift && "$@"',
    }.items():
        (here / name).write_text(f"#!/bin/sh\n{body}\n")
        (here / name).chmod(0o755)
    job = {"SLURM_JOB_ID": "71", "SLURM_JOB_NODELIST": "localhost", "SLURM_JOB_NUM_NODES": "1", "RANKS": "2"}
    path = f"{here}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    # Those of a step that srun starts, one task a machine, as if there were a second.
    environment = os.environ | job | STEP | {"PATH": path, "CLEAR_DIST_ROOT": str(ROOT)}
    environment |= {"SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    command = ["bash", str(ROOT / "launchers/slurm.sbatch"), "--model", str(model), *QUICK, "--output", "x.jpg"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("output=x.jpg") == 1 and " ranks=2 " in done.stdout


def test_an_output_that_another_job_writes_is_refused(model: Path, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = {"XDG_CACHE_HOME": str(here / "cache")}
    monkeypatch.setenv("XDG_CACHE_HOME", home["XDG_CACHE_HOME"])
    with outputs.claimed((Path("x.png"), None, Path("r.json"))) as taken:
        assert taken is None
        for flags, name in (
            (("--output", "x.png"), "x.png"),
            (("--report", str(here / "r.json")), str(here / "r.json")),
        ):
            job = start(model, home, "--nproc", "2", *flags)
            _, errors = job.communicate()
            assert job.returncode == 2
            assert errors.startswith(
                f"clear-dist: two running jobs cannot write the same file or folder, got {name}; nearest: "
            )
            assert errors.count("\n") == 1
        other = start(model, home, "--output", "y.png")
        assert other.communicate()[1] == "" and other.returncode == 0
    later = start(model, home, "--output", "x.png")
    assert later.communicate()[1] == "" and later.returncode == 0
