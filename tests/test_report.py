import json
from pathlib import Path

import pytest
import torch

from clear_dist import report

FIGURES = report.RankFigures(peak_memory_bytes=5, peak_since_loading=True, comm={"halo_bytes_sent": [1, 2]})


def build(**changes: object) -> dict:
    given: dict = {
        "seed": 3,
        "settings": {"steps": 2},
        "grid": (4, 6),
        "stripes": [(0, 2), (2, 4)],
        "seconds": {"launch": 1.0, "load": 1.0, "text": 0.1, "denoise": 2.0, "decode": 0.1, "save": 0.1, "total": 5.0},
        "seconds_per_step": [1.0, 1.0],
        "ranks": [FIGURES, FIGURES],
    }
    return report.build(**(given | changes))


def test_schema_1_as_json(tmp_path: Path) -> None:
    report.write(build(), tmp_path / "r.json")
    got = json.loads((tmp_path / "r.json").read_text())
    assert (got["schema"], got["seed"], got["world_size"]) == (1, 3, 2)
    assert got["grid"] == [4, 6]
    assert got["stripes"] == [[0, 2], [2, 4]]
    assert got["stages"] == [
        {"grid": [4, 6], "stripes": [[0, 2], [2, 4]], "seconds": 2.0, "seconds_per_step": [1.0, 1.0]}
    ]
    assert got["peak_memory_bytes"] == [5, 5]
    assert got["comm"] == [{"halo_bytes_sent": [1, 2]}] * 2
    assert {"clear-dist", "torch", "diffusers", "transformers", "python"} <= got["versions"].keys()


def test_memory_that_includes_loading_is_said() -> None:
    loading_too = report.RankFigures(peak_memory_bytes=5, peak_since_loading=False, comm={})
    assert build()["peak_memory_includes_loading"] is False
    assert build(ranks=[FIGURES, loading_too])["peak_memory_includes_loading"] is True


def test_peak_memory_sees_what_was_freed_since_the_reset() -> None:
    device = torch.device("cpu")
    big = torch.ones(200_000_000, dtype=torch.uint8)
    del big
    if not report.reset_peak_memory(device):
        pytest.skip("the system does not let us reset the high-water mark")
    low = report.peak_memory(device)
    middle = torch.ones(100_000_000, dtype=torch.uint8)
    del middle
    assert 80_000_000 < report.peak_memory(device) - low < 120_000_000
