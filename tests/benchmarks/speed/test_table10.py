"""Table 10 in the paper's protocol, from results of steps."""

import csv
import re
from pathlib import Path
from unittest.mock import Mock

import pytest

from benchmarks.lib.tables import Cell, load, save
from benchmarks.speed import table10, table10_shown
from clear_dist.comm.clock import Clock
from clear_dist.options import WARMUP_STEPS

RESULTS = Path(__file__).parents[3] / "benchmarks" / "results" / "2026-11-21-cpu"


def cell(setting: str, ranks: int, seconds: float, *, origin="measured", side=1024, window=16) -> Cell:
    return Cell(setting=setting, window=window, side=side, ranks=ranks, origin=origin, seconds=[seconds])


CELLS = [
    cell("full attention", 1, 4.0, window="full"),
    cell("full attention", 8, 1.0, window="full"),
    cell("full attention, DistriFusion", 1, 4.0, window="full"),
    cell("full attention, DistriFusion", 8, 0.5, window="full"),
    cell("full attention, Ulysses", 8, 0.8, window="full"),
    cell("CLEAR r = 16", 1, 3.0),
    cell("CLEAR r = 16", 8, 2.0),
    cell("CLEAR r = 16", 8, 1.0, origin="projected"),
    cell("CLEAR r = 16, stale", 1, 3.0),
    cell("CLEAR r = 16, stale", 8, 1.5),
    cell("CLEAR r = 16, stale", 8, 0.5, origin="projected"),
    cell("CLEAR r = 8, stale", 8, 0.5, window=8),
]
"""Seconds of a step; of r = 8 in sync there is none."""


@pytest.fixture
def header() -> dict:
    return load(RESULTS, "table10")[0]


def test_a_stale_generation_is_4_steps_in_sync_and_46_stale_ones():
    seconds = [table10_shown.columns_of(CELLS)(found)["seconds_per_50_steps"] for found in CELLS]
    assert seconds.pop() is None
    assert seconds == pytest.approx([200, 50, 200, 27, 40, 150, 100, 50, 150, 77, 27])


def test_the_engine_begins_so_too():
    clock, lagging = Clock(warmup_steps=WARMUP_STEPS), 0
    generation = object()
    for step in range(50):
        clock.tick(generation, object())
        lagging += clock.may_lag(step - 1)
    assert lagging == 46


def test_a_cell_in_the_table(header, capsys):
    table10_shown.show_size(CELLS, header)
    text = capsys.readouterr().out
    assert "1024 px: s / 50 steps | s / step" in text
    assert re.search(r"│ full attention, DistriFusion │ +200\.00 \| 4\.000 │ +27\.00 \| 0\.500 │", text)
    assert re.search(r"│ CLEAR r = 16, stale +│ +150\.00 \| 3\.000 │ +77\.00 \| 1\.500 │", text)
    assert "measured, 7.41 x" in text and "measured, 1.95 x" in text and "projected, 5.56 x" in text
    assert re.search(r"│ CLEAR r = 8, stale +│ +- │ +- \| 0\.500 │", text)
    assert text.count("paper: NA") == 2  # r = 16 on 8 ranks, in sync and stale


@pytest.mark.parametrize(
    ("ranks", "side", "window", "expected"),
    [(8, 1024, 16, "NA"), (4, 1024, 16, ""), (8, 2048, 16, ""), (8, 1024, 8, ""), (8, 1024, "full", "")],
)
def test_cells_that_the_paper_calls_na(ranks, side, window, expected):
    found = cell("any", ranks, 1.0, side=side, window=window)
    assert table10_shown.columns_of([found])(found)["paper"] == expected


def test_files_hold_50_steps(header, tmp_path):
    save(tmp_path, "table10", header, CELLS, table10_shown.columns_of(CELLS))
    assert load(tmp_path, "table10")[1] == CELLS
    with (tmp_path / "table10.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert rows[9]["seconds_per_50_steps"] == "77.0" and rows[9]["paper"] == "NA"
    assert rows[-1]["seconds_per_50_steps"] == rows[-1]["paper"] == "" and "seconds_per_20_steps" not in rows[0]


def test_saved_results_are_shown_again(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("benchmarks.lib.tables.find_spec", lambda name: name)
    (tmp_path / "table10.json").write_bytes((RESULTS / "table10.json").read_bytes())
    plotted = Mock()
    monkeypatch.setattr(table10, "plot", plotted)
    monkeypatch.setattr("sys.argv", [table10.__file__, "--again", "--folder", str(tmp_path)])
    table10.main()
    text = capsys.readouterr().out
    assert text.count(" px: s / 50 steps") == 3
    assert "CLEAR r = 16, 64 x 64 tokens: 2 ranks are 1.78 times as fast as 1 (measured)" in text
    assert "paper: NA: Table 10 leaves out r = 16 at 1024 px" in text
    assert plotted.call_args.args[2] == tmp_path / "table10.png"
    assert [file.name for file in tmp_path.iterdir()] == ["table10.json"]
