"""Table 6: which cells there are, how they are laid out, and what a folder of results refuses."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from benchmarks.fidelity.drawn import Cell, Drawn, planned
from benchmarks.fidelity.kept import digest, keep_settings, weights_by_name
from benchmarks.fidelity.table6 import table


def figures(
    weights: str, ranks: int, text: str = "exact", warmup: int | None = None, psnr: float | None = 20.0
) -> dict:
    cell = {"weights": weights, "steps": 28, "ranks": ranks, "text_attention": text, "warmup_steps": warmup}
    if psnr is None:
        return {**cell, "psnr": None}
    return {**cell, "psnr": psnr, "worst_psnr": psnr - 4, "ssim": 0.875, "attributes": 0.9, "psnr_to_full": None}


def test_rows_are_ways_to_draw_beside_the_papers() -> None:
    given = [
        figures("full", 1),
        figures("full", 2, warmup=4, psnr=54.25),
        {**figures("clear_local_8", 1), "psnr_to_full": 31.0, "attributes": 0.8125},
        figures("clear_local_8", 2, "average"),
        figures("clear_local_8", 2),
        figures("clear_local_8", 8, "average", psnr=None),
    ]
    lines = [
        [cell.strip() for cell in line.strip("|\n").split("|")] for line in table(given).splitlines() if "|" in line
    ]
    assert lines[0] == ["weights", "text", "schedule", "N = 1", "N = 2", "N = 8"]
    assert lines[2:5] == [
        ["full", "exact", "stale, 4 warm-up steps", "90.0 %", "54.2 (50.2), 0.875, 90.0 %", ""],
        ["clear_local_8", "average", "sync", "31.0, 81.2 %", "20.0 (16.0), 0.875, 90.0 %", "NA"],
        ["clear_local_8", "exact", "sync", "31.0, 81.2 %", "20.0 (16.0), 0.875, 90.0 %", ""],
    ]
    (*_, two, eight) = lines[5]
    assert two == "LPIPS 0.51, CLIP-I 90.46, DINO 80.89, FID 11.55; CLIP-T 31.21, IS 39.26"
    assert "LPIPS 0.57" in eight and len(lines) == 6


def test_full_attention_has_no_average_and_one_rank_no_schedule() -> None:
    cells = {weights: list(planned(weights, [28], [8, 2], [4])) for weights in ("full", "clear_local_8")}
    ways = {
        weights: [[(cell.ranks, cell.text_attention, cell.warmup_steps) for cell in group] for group in groups]
        for weights, groups in cells.items()
    }
    exact = {ranks: [(ranks, "exact", None), (ranks, "exact", 4)] for ranks in (2, 8)}
    assert ways["full"] == [[(1, "exact", None)], exact[2], exact[8]]
    averages = [[(ranks, "average", None), *exact[ranks]] for ranks in (2, 8)]
    assert ways["clear_local_8"] == [[(1, "exact", None)], *averages]


def test_ranks_have_whole_down_sampled_keys(tmp_path: Path) -> None:
    pooled, plain = tmp_path / "clear_local_8_down_4.safetensors", tmp_path / "clear_local_8.safetensors"
    save_file({"a.attn.processor.spatial_weight": torch.ones(1, 1, 1, 4, 1, 4, 1)}, pooled)
    save_file({"a.attn.to_q.weight": torch.ones(1)}, plain)
    drawn = Drawn(model=tmp_path, files=weights_by_name([pooled, plain]), res=256, folder=tmp_path)
    assert [drawn.most_ranks(name) for name in ("full", *drawn.files)] == [16, 4, 16]


def test_only_cells_that_are_missing_are_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cells = [Cell(weights="full", steps=1, ranks=2), Cell(weights="full", steps=1, ranks=2, warmup_steps=0)]
    drawn = Drawn(model=tmp_path, folder=tmp_path)
    monkeypatch.setattr("multiprocessing.get_context", lambda _: pytest.fail("ranks were started"))
    np.save(drawn.file(cells[0]), np.zeros(1))
    with pytest.raises(pytest.fail.Exception):
        drawn.draw(cells)
    np.save(drawn.file(cells[1]), np.zeros(1))
    drawn.draw(cells)


def test_results_of_other_settings_are_refused(tmp_path: Path) -> None:
    file, folder = tmp_path / "clear_local_8.safetensors", tmp_path / "results"
    file.write_bytes(b"before")
    keep_settings(folder, {"res": 256, file.stem: digest(file)})
    keep_settings(folder, {"res": 256, "clear_local_4": "of another file"})
    file.write_bytes(b"after")
    with pytest.raises(ValueError, match=r"holds results with clear_local_8 [0-9a-f]{16}, got [0-9a-f]{16}; nearest"):
        keep_settings(folder, {"res": 256, file.stem: digest(file)})
    with pytest.raises(ValueError, match="with res 256, got 512; nearest: 256, or another folder"):
        keep_settings(folder, {"res": 512})


def test_clear_files_need_a_radius_and_names_of_their_own(tmp_path: Path) -> None:
    for name in ("a/clear_local_8.safetensors", "b/clear_local_8.safetensors", "other.safetensors"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match=r"named clear_local_<radius>.safetensors, got .*other"):
        weights_by_name([tmp_path / "other.safetensors"])
    with pytest.raises(ValueError, match="must have different names"):
        weights_by_name([tmp_path / "a/clear_local_8.safetensors", tmp_path / "b/clear_local_8.safetensors"])
