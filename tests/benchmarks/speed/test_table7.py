"""Table 7 and Fig. 2 beside the paper, from results of steps."""

import csv
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest

from benchmarks.lib.tables import Cell, load, save
from benchmarks.speed import table7

RESULTS = Path(__file__).parents[3] / "benchmarks" / "results" / "2026-11-21-cpu"
WINDOWS = {"full attention": "full", "CLEAR r = 8": 8, "CLEAR r = 5": 5}


def cells_of(side: int, seconds: dict[str, float | None]) -> list[Cell]:
    return [
        Cell(
            setting=name,
            window=WINDOWS[name],
            side=side,
            ranks=1,
            origin="measured" if second else "too long",
            seconds=[second] if second else [],
        )
        for name, second in seconds.items()
    ]


@pytest.fixture
def header() -> dict:
    return load(RESULTS, "table7")[0]


def row(text: str, setting: str) -> list[str]:
    """The setting's line in the table of what is saved."""
    (line,) = [line for line in text.splitlines() if f" {setting} " in line and "%" in line and " px " not in line]
    return re.findall(r"[^│]+", line.replace(" ", ""))


def test_what_clear_saves_at_8192_px(header, capsys):
    """The paper's own seconds of a step give the paper's figures: 99.5 % and 6.3 times."""
    seconds = {"full attention": 1842.48 / 20, "CLEAR r = 8": 293.50 / 20, "CLEAR r = 5": None}
    table7.show(cells_of(8192, seconds), header)
    text = capsys.readouterr().out
    assert row(text, "CLEAR r = 8") == ["CLEARr=8", "99.54%", "99.5%", "6.3", "6.3"]
    assert row(text, "CLEAR r = 5")[2:] == ["-", "notmeasured", "-"]


def test_operations_are_counted_where_8192_px_were_not_timed(header, capsys):
    table7.show(cells_of(1024, {"full attention": 1.0, "CLEAR r = 8": 1.0}), header)
    assert row(capsys.readouterr().out, "CLEAR r = 8") == ["CLEARr=8", "99.54%", "99.5%", "notmeasured", "6.3"]


def test_files_hold_operations_per_layer_and_20_steps(header, tmp_path):
    cells = cells_of(2048, {"full attention": 2.0, "CLEAR r = 8": None})
    save(tmp_path, "table7", header, cells, table7.columns_of)
    assert load(tmp_path, "table7")[1] == cells
    with (tmp_path / "table7.csv").open() as file:
        full, window = csv.DictReader(file)
    assert full["seconds_per_20_steps"] == "40.0" and window["seconds_per_20_steps"] == ""
    counted = [float(line["attention_teraflop_per_layer"]) for line in (full, window)]
    assert counted == pytest.approx([3.5079, 0.2462], abs=5e-5)  # the paper's, with more digits than Table 7


def test_the_plot_is_of_seconds_and_operations(header, monkeypatch):
    figure, times, work = Mock(), Mock(), Mock()
    pyplot = SimpleNamespace(subplots=lambda *sizes, **_: (figure, (times, work)), close=Mock())
    monkeypatch.setitem(sys.modules, "matplotlib", SimpleNamespace(pyplot=pyplot))
    cells = cells_of(512, {"full attention": 0.5, "CLEAR r = 8": None, "CLEAR r = 5": 0.25})
    table7.plot(cells, header, Path("table7.png"))
    figure.savefig.assert_called_once()
    drawn = [tuple(map(list, call.args[:2])) for call in times.plot.call_args_list]
    paper = [1024, 2048, 4096, 8192]
    assert drawn == [
        ([512], [10.0]), (paper, [4.45, 20.90, 148.97, 1842.48]),
        ([], []), (paper, [4.40, 15.67, 69.41, 293.50]),
        ([512], [5.0]),
    ]  # fmt: skip
    (full, theirs, window, *_) = [call.args[:2] for call in work.plot.call_args_list]
    assert list(full[0]) == [512, *paper] and list(theirs[0]) == paper
    assert full[1][1:] == pytest.approx(theirs[1], rel=0.02)
    assert window[1][-1] == pytest.approx(3.92, rel=0.01)


def test_saved_results_are_shown_again_and_left_as_they_are(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("benchmarks.lib.tables.find_spec", lambda name: name)
    (tmp_path / "table7.json").write_bytes((RESULTS / "table7.json").read_bytes())
    plotted = Mock()
    monkeypatch.setattr(table7, "plot", plotted)
    monkeypatch.setattr("sys.argv", [table7.__file__, "--again", "--folder", str(tmp_path)])
    table7.main()
    assert re.search(r"full attention +│ +1\.49 │ +11\.02 │ +4\.45 │ +130\.63 │ +20\.90 ", capsys.readouterr().out)
    assert plotted.call_args.args[2] == tmp_path / "table7.png"
    assert [file.name for file in tmp_path.iterdir()] == ["table7.json"]
    assert (tmp_path / "table7.json").read_bytes() == (RESULTS / "table7.json").read_bytes()


@pytest.mark.parametrize(
    ("flags", "has_matplotlib", "told"),
    [
        (["--again"], True, "--again needs the table7.json of a run before, got --folder None"),
        (
            ["--again", "--folder", "no-such"],
            True,
            "--again needs the table7.json of a run before, got --folder no-such",
        ),
        (["--folder", "results"], False, "--folder is for plots too, and there is no matplotlib: pip install"),
    ],
)
def test_what_cannot_be_done_is_told_in_a_line_before_measuring(flags, has_matplotlib, told, monkeypatch, capsys):
    monkeypatch.setattr("benchmarks.lib.tables.find_spec", lambda name: name if has_matplotlib else None)
    monkeypatch.setattr("sys.argv", [table7.__file__, *flags])
    with pytest.raises(SystemExit, match="2"):
        table7.main()
    (line,) = capsys.readouterr().err.splitlines()
    assert told in line
