"""What `auto` chooses where backends were measured, and where the table comes from."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from clear_dist.attention import BACKENDS, choose_backend, measured
from clear_dist.attention.backend import CallShape
from clear_dist.attention.measured import Measured

ROOT = Path(__file__).parents[2]


def row(seconds: dict[str, float], **sizes: int | str) -> Measured:
    known = {"rows": 16, "columns": 16, "radius": 8, "text": 32, "head_dim": 64} | sizes
    return Measured(**{"device_type": "cpu", "dtype": "torch.float32", "source": "a/b.json"} | known, seconds=seconds)


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> list[Measured]:
    """The table, empty to begin with."""
    listed: list[Measured] = []
    monkeypatch.setattr(measured, "table", lambda: listed)
    return listed


def choose(device: str = "cpu", **changed: int) -> str:
    sizes = {"rows": 16, "key_rows": 16, "columns": 16, "text": 32, "radius": 8, "head_dim": 64} | changed
    return choose_backend("auto", device=device, dtype=torch.float32, **sizes).name


def test_the_nearest_shape_decides(rows: list[Measured]) -> None:
    rows += [row({"masked": 1, "tiled": 2}), row({"masked": 2, "tiled": 1}, rows=64, columns=64)]
    assert choose() == choose(rows=20, columns=24) == choose(radius=16) == "masked"
    assert choose(rows=64, columns=64) == choose(rows=40, columns=48) == "tiled"
    rows.append(row({"masked": 3, "tiled": 4}, rows=64, columns=64, radius=32))
    assert choose(rows=64, columns=64, radius=24) == "masked"
    assert choose(rows=64, columns=64, radius=15) == "tiled"


@pytest.mark.parametrize(("name", "sizes"), [("text", (0, 32, 512)), ("head_dim", (32, 64, 128))])
def test_text_and_heads_count_too(rows: list[Measured], name: str, sizes: tuple[int, ...]) -> None:
    rows += [row({"masked": 1, "tiled": 2}, **{name: sizes[1]}), row({"masked": 2, "tiled": 1}, **{name: sizes[2]})]
    assert [choose(**{name: size}) for size in sizes] == ["masked", "masked", "tiled"]


def test_what_cannot_run_is_passed_over_and_the_log_says_so(
    rows: list[Measured], caplog: pytest.LogCaptureFixture
) -> None:
    rows.append(row({"masked": 1e-3, "tiled": 2e-3, "gone": 1e-4}))
    with caplog.at_level(logging.INFO, logger="clear_dist.attention"):
        assert choose(rows=2000, key_rows=2000, columns=2000) == "tiled"
    assert "measured at 16 x 16 tokens, radius 8, 32 text tokens, heads of 64: gone 0.1 ms, masked 1 ms" in caplog.text
    assert "masked skipped: its mask would take" in caplog.text


def test_a_backend_that_was_measured_needs_no_name(rows: list[Measured], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clear_dist.attention.flex.find_spec", lambda _: object())
    monkeypatch.setattr("clear_dist.attention.triton_window.find_spec", lambda _: object())
    assert choose("cuda") == "flex"
    rows.append(row({"triton": 1, "flex": 2}, device_type="cuda"))
    assert choose("cuda") == "triton"


def test_where_nothing_was_measured_the_order_decides_and_the_log_says_so(
    rows: list[Measured], caplog: pytest.LogCaptureFixture
) -> None:
    rows.append(row({"masked": 1, "tiled": 2}))
    with caplog.at_level(logging.INFO, logger="clear_dist.attention"):
        assert choose("mps") == "tiled"
    assert "attention backends were not measured on mps: tried in their order" in caplog.text


def test_without_sizes_nothing_is_near_and_nothing_is_said(caplog: pytest.LogCaptureFixture) -> None:
    assert measured.nearest(CallShape("cpu", torch.float32, head_dim=64)) is None
    with caplog.at_level(logging.INFO, logger="clear_dist.attention"):
        assert choose_backend("auto", device="cpu", dtype=torch.float32, head_dim=64).name == "tiled"
    assert "measured" not in caplog.text


def test_the_embedded_models_own_size_was_measured() -> None:
    """16 x 16 tokens, radius 8, 32 text tokens, heads of 32: faster at once than by tiles."""
    assert choose(head_dim=32) == "masked"
    assert choose(rows=128, key_rows=128, columns=128, head_dim=32) == "tiled"


def test_the_table_is_what_the_results_say() -> None:
    """Made anew from the files that it names, it is the same; each of its rows is among theirs."""
    script = "from benchmarks.speed import backends as b; print(b.table_of(b.results()), end='')"
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-c", script]
    made = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True)
    assert made.stdout == measured.TABLE.read_text(), made.stderr
    table = measured.table()
    assert table and len({(r.device_type, r.rows, r.columns, r.radius, r.text, r.head_dim) for r in table}) == len(
        table
    )
    for listed in table:
        results = json.loads((ROOT / "benchmarks" / "results" / listed.source).read_text())
        assert {"date", "device"} <= results["machine"].keys()
        assert set(listed.seconds) <= set(BACKENDS) and min(listed.seconds.values()) > 0
