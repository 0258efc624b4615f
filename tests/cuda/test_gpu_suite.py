"""`python -m benchmarks.gpu.suite` from beginning to end: checks of numbers fail there, and nothing else does."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.cuda.null_gpu import Machine, NullGpus
from tests.patience import PATIENCE

PARTS = ("correctness", "ranks", "kernels", "steps", "tuning", "profile")
NOT_HERE = (
    "is not installed",
    "No module named 'natten'",
    "its mask would take",
    "skipped: no time is left",
    "skipped, too long",
    "no kernels are in the trace",
)
"""Words of notes that are no faults: packages, sizes beyond a backend, time."""


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [row for part in PARTS for row in json.loads((folder / f"{part}.json").read_text())["rows"]]


@pytest.mark.parametrize(
    ("flags", "minutes"),
    [pytest.param(["--small"], 10, id="small"), pytest.param([], 8.5, id="full", marks=pytest.mark.full)],
)
def test_every_part_runs(flags: list[str], minutes: float, null_gpus: NullGpus, tmp_path: Path) -> None:
    ended = null_gpus.run(
        "-m", "benchmarks.gpu.suite", *flags, "--minutes", str(minutes * PATIENCE), "--folder", tmp_path,
        machine=Machine(gpus=1, gib=139.0), folder=tmp_path,
    )  # fmt: skip
    states = {
        name: part["state"] for name, part in json.loads((tmp_path / "summary.json").read_text())["parts"].items()
    }
    # Of these the numbers are checked.
    assert states == dict.fromkeys(PARTS, "done") | {"correctness": "failed", "ranks": "failed"}, ended.err
    rows = rows_of(tmp_path)
    assert [row for row in rows if "error" in row] == []
    notes = [row["note"] for row in rows if "note" in row]
    assert [note for note in notes if not any(known in note for known in NOT_HERE)] == []
    steps = {row["candidate"] for row in rows if row.get("seconds") and "candidate" in row}
    assert {"CLEAR r = 16", "CLEAR r = 16, share of 8", "row-major r = 16", "full attention"} <= steps
    tuned = [row for row in rows if "what" in row and row.get("side_px") and row.get("seconds")]
    assert {row["what"] for row in tuned} == {"tiles", "the VAE's attention", "a step"}
    assert len([row for row in tuned if row["what"] == "a step"]) == 3
    assert {row["ranks"] for row in rows if "ranks" in row} == {1, 2, 3}
