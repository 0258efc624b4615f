"""Caches compared on small pictures of few steps: what is counted, what stands for what, and going on."""

import json
import sys
from pathlib import Path

import pytest

from benchmarks.fidelity import caches, caches_shown

FLAGS = ("--res", "64", "--steps", "6", "--pictures", "1", "--thresholds", "2", "--distances", "2", "--fewer", "3")


def test_a_cache_leaves_out_blocks_and_a_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "page.md"
    page.write_text("<!-- caches -->\n<!-- /caches -->\n")
    flags = ("--drawn", str(tmp_path / "drawn"), "--results", str(tmp_path), "--page", str(page))
    monkeypatch.setattr(caches, "find_spec", lambda name: name)
    monkeypatch.setattr(caches_shown, "plot", lambda figures, file: None)  # matplotlib need not be here
    monkeypatch.setattr(sys, "argv", [caches.__file__, *FLAGS, *flags])
    caches.main()
    found = {row["way"]: row for row in json.loads((tmp_path / "caches.json").read_text())["figures"]}
    assert found["none"]["psnr"] == caches.TOP and found["none"]["time"] == found["none"]["blocks"] == 1
    assert found["steps:3"]["blocks"] == 3 / 6
    # Steps 1 to 3 of 6 run one block of 8, or none but the first three, the last two and each second.
    assert found["first-block:2"]["skipped"] == 3 and found["first-block:2"]["blocks"] == (3 + 3 / 8) / 6
    assert found["taylor:2"]["skipped"] == 1 and found["taylor:2"]["blocks"] == 5 / 6
    assert found["taylor:2"]["psnr"] < caches.TOP
    assert "`taylor:2`" in page.read_text() and "(caches.png)" in page.read_text()
    monkeypatch.setattr(caches, "drawn", None)  # nothing is drawn again
    caches.main()


def test_missing_matplotlib_is_told_before_drawing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(caches, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", [caches.__file__])
    with pytest.raises(SystemExit, match="2"):
        caches.main()
    assert "matplotlib, which is missing; nearest: pip install -e '.[bench]'" in capsys.readouterr().err
