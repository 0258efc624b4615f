"""The single-GPU suite's plumbing, on a CPU at toy sizes."""

import json
import os
import signal
import subprocess
import sys
import time
from argparse import Namespace
from functools import partial
from pathlib import Path

import pytest

from benchmarks.gpu import suite
from tests.forked import forked
from tests.patience import PATIENCE

ROOT = Path(__file__).parents[3]


def run(*flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.gpu.suite", *flags]
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True)


def run_forked(*flags: str) -> tuple[int | None, str]:
    """Exit status and stderr, without the seconds of imports."""
    process = forked(partial(be_suite, *flags))
    _, errors = process.communicate()
    return process.returncode, errors


def be_suite(*flags: str) -> None:
    sys.argv = [suite.__file__, *flags]
    suite.main()


def rows_of(folder: Path, part: str) -> list[dict]:
    return json.loads((folder / f"{part}.json").read_text())["rows"]


def test_all_parts_run(tmp_path):
    ended = run("--device", "cpu", "--small", "--minutes", str(6 * PATIENCE), "--folder", str(tmp_path))
    assert ended.returncode == 0, ended.stdout + ended.stderr
    summary = json.loads((tmp_path / "summary.json").read_text())
    parts = ["correctness", "ranks", "kernels", "steps", "tuning", "profile"]
    assert {name: part["state"] for name, part in summary["parts"].items()} == dict.fromkeys(parts, "done")
    files = {f"{name}.json" for name in parts} | {"summary.json", "trace.json.gz"}
    assert {file.name for file in tmp_path.iterdir()} == files
    checks = [row for part in parts[:2] for row in rows_of(tmp_path, part) if row.get("passed") is not None]
    assert len(checks) >= 20 and all(row["passed"] for row in checks)
    changed = [row for row in rows_of(tmp_path, "correctness") if "what the window changes" in row.get("model", "")]
    assert changed[0]["relative_error"] > 0.1
    kernels = rows_of(tmp_path, "kernels")
    assert {row.get("candidate") for row in kernels if "seconds" in row} >= {"CLEAR, tiled", "CLEAR, masked", "SDPA"}
    table = [row for row in kernels if "device_type" in row]  # what auto's table is made of
    assert {(row["rows"], row["radius"]) for row in table} == {
        (side, radius) for side in (16, 8) for radius in (8, 16, 32)
    }
    assert all(row["seconds"].keys() >= {"tiled", "masked"} for row in table)
    steps = {row["candidate"] for row in rows_of(tmp_path, "steps") if row.get("seconds")}
    assert steps >= {"CLEAR r = 16", "CLEAR r = 16, share of 8", "CLEAR r = 16, hoisted modulation", "full attention"}
    assert rows_of(tmp_path, "profile")[0]["ms_per_step"] > 0


def test_a_part_that_fails_is_recorded_and_the_others_go_on(tmp_path):
    parts = ["--parts", "profile", "correctness"]
    status, _ = run_forked("--device", "cpu", "--small", "--backend", "no-such", *parts, "--folder", str(tmp_path))
    assert status == 1
    states = json.loads((tmp_path / "summary.json").read_text())["parts"]
    assert states["profile"]["state"] == "failed"
    assert "no-such" in rows_of(tmp_path, "profile")[-1]["error"]
    assert len(rows_of(tmp_path, "correctness")) > 5


def test_without_time_parts_are_skipped(tmp_path):
    status, _ = run_forked("--device", "cpu", "--small", "--minutes", "0.01", "--folder", str(tmp_path))
    assert status == 0
    assert {part["state"] for part in json.loads((tmp_path / "summary.json").read_text())["parts"].values()} == {
        "skipped"
    }


def test_a_part_that_is_out_of_time_may_end_its_ranks(tmp_path, monkeypatch):
    def work(*_):
        signal.signal(signal.SIGTERM, lambda *_: sys.exit((tmp_path / "ended").touch()))
        signal.pause()

    monkeypatch.setattr(suite, "work", work)
    monkeypatch.setattr(suite, "LEAST_SECONDS", 2.0 * PATIENCE)
    deadline = time.time() + suite.LEAST_SECONDS + 0.1
    part = suite.run_part("ranks", Namespace(device="cpu"), tmp_path, deadline=deadline)
    assert part["state"] == "out of time"
    assert (tmp_path / "ended").exists()


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("--device", "cpu"), "add --small"),
        (("--device", "cpu", "--small", "--parts", "speed"), "invalid choice: 'speed'"),
        (("--device", "cpu", "--small", "--minutes", "-1"), "above 0"),
    ],
)
def test_wrong_flags_are_answered_in_one_line(flags, told):
    status, errors = run_forked(*flags)
    assert status == 2
    lines = [line for line in errors.splitlines() if line.startswith("python -m benchmarks.gpu.suite: ")]
    assert "Traceback" not in errors
    assert len(lines) == 1 and told in lines[0]  # libraries talk, too
