import json
from dataclasses import replace
from pathlib import Path

from clear_dist.observe import report
from clear_dist.observe.progress import LoadedPart, Times

SECONDS = {"load": 1.0, "text": 0.1, "encode": 0.0, "denoise": 0.0, "decode": 0.5, "save": 0.0}
FIGURES = report.RankFigures(
    peak_memory_bytes=5,
    peak_since_loading=True,
    weight_bytes=9,
    stale_buffer_bytes=7,
    compile_seconds=0.5,
    comm={"halo_bytes_sent": [1, 2]},
)


def build(**changes: object) -> dict:
    given: dict = {
        "seed": 3,
        "settings": {"steps": 2},
        "times": Times(seconds=SECONDS | {"denoise": 7.0}, seconds_per_step=[1.0, 1.0, 5.0]),
        "launch": 1.0,
        "total": 9.0,
        "stages": [
            report.StageFigures(
                image={"grid": [2, 3], "cut": "rows", "stripes": [[0, 2]], "skipped_steps": []},
                ranks=1,
                times=Times(SECONDS | {"denoise": 2.0}, [1.0, 1.0]),
                why="it is sooner",
            ),
            report.StageFigures(
                image={"grid": [4, 6], "cut": "columns", "stripes": [[0, 3], [3, 6]], "skipped_steps": [3, 4]},
                ranks=2,
                times=Times(SECONDS | {"denoise": 5.0}, [5.0]),
            ),
        ],
        "ranks": [FIGURES, FIGURES],
    }
    return report.build(**(given | changes))


def test_schema_1_as_json(tmp_path: Path) -> None:
    ranks = [replace(FIGURES, loading_peak_bytes=11, host_memory_bytes=share) for share in (13, None)]
    report.write(build(ranks=ranks, parts=[LoadedPart("vae", 3_000_000_000, 2.0)]), tmp_path / "r.json")
    got = json.loads((tmp_path / "r.json").read_text())
    assert (got["schema"], got["seed"], got["world_size"]) == (1, 3, 2)
    assert got["grid"] == [4, 6]
    assert (got["cut"], got["stripes"]) == ("columns", [[0, 3], [3, 6]])
    parts = {"encode": 0.0, "decode": 0.5, "save": 0.0}
    assert got["stages"] == [
        {
            "grid": [2, 3],
            "cut": "rows",
            "stripes": [[0, 2]],
            "ranks": 1,
            "why_fewer_ranks": "it is sooner",
            "guidance_ranks": 1,
            "data_rank": 0,
            "skipped_steps": [],
            "seconds": parts | {"denoise": 2.0},
            "seconds_per_step": [1.0, 1.0],
        },
        {
            "grid": [4, 6],
            "cut": "columns",
            "stripes": [[0, 3], [3, 6]],
            "ranks": 2,
            "why_fewer_ranks": None,
            "guidance_ranks": 1,
            "data_rank": 0,
            "skipped_steps": [3, 4],
            "seconds": parts | {"denoise": 5.0},
            "seconds_per_step": [5.0],
        },
    ]
    assert got["seconds_per_step"] == [1.0, 1.0, 5.0]
    assert got["seconds"]["denoise"] == 7.0
    assert (got["seconds"]["launch"], got["seconds"]["total"]) == (1.0, 9.0)
    assert got["peak_memory_bytes"] == [5, 5]
    assert got["weight_bytes"] == [9, 9]
    assert got["stale_buffer_bytes"] == [7, 7]
    assert got["compile_seconds"] == [0.5, 0.5]
    assert got["loading"] == {
        "parts": [{"name": "vae", "bytes": 3_000_000_000, "seconds": 2.0, "gigabytes_per_second": 1.5}],
        "peak_memory_bytes": [11, 11],
        "host_memory_bytes": [13, None],
    }
    assert got["comm"] == [{"halo_bytes_sent": [1, 2]}] * 2
    assert {"clear-dist", "torch", "diffusers", "transformers", "python"} <= got["versions"].keys()


def test_memory_that_includes_loading_is_said() -> None:
    loading_too = replace(FIGURES, peak_since_loading=False)
    assert build()["peak_memory_includes_loading"] is False
    assert build(ranks=[FIGURES, loading_too])["peak_memory_includes_loading"] is True
