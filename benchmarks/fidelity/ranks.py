"""How much do pictures drawn on several ranks differ from those of one rank?

    python -m benchmarks.fidelity.ranks --results fidelity

Draws 32 held-out prompts with the embedded model on 1, 2, 4 and 8 ranks, with both text reductions and in both
schedules (drawn.py), and compares each picture with the same request on one rank, in sync: our counterpart of the
paper's Table 6. Drawn cells are kept, so that an interrupted run can go on (delete them after a change of the engine).
Results cover the cells compared by this run, and are written after each.

- PSNR in dB, SSIM and MS-SSIM of the 8-bit pictures, by torchmetrics: medians over prompts, and the worst. (SSIM in
  results of 2026-11-21 is scikit-image's, whose window is not Gaussian.)
- seam: difference of rows across the borders between ranks, over the same on one rank. 1: no seam.
"""

import csv
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.fidelity.drawn import SEED, held_out_prompts, pictures_of, planned
from benchmarks.fidelity.plots import contact_sheet, plot
from benchmarks.lib.flags import Parser
from benchmarks.lib.machine import machine, save
from clear_dist.evaluate.scores import likeness
from clear_dist.pictures import replacing

STEPS = (12, 28, 50)
IDENTICAL = 110.0
"""dB of two equal pictures; two that differ by one in a single value are at 101."""


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--results", type=Path, default=Path("fidelity"), help="tables, plot and contact sheet")
    parser.add_argument("--drawn", type=Path, default=Path("fidelity/drawn"), help="the cells' pictures, 6 MB each")
    parser.add_argument("--steps", type=int, nargs="+", choices=STEPS, default=STEPS, help="steps of the cells")
    parser.add_argument("--only-drawn", action="store_true", help="draw nothing, compare the cells in --drawn")
    arguments = parser.parse_args()
    arguments.results.mkdir(parents=True, exist_ok=True)
    cells = [cell for cell in planned() if cell.steps in arguments.steps]
    if arguments.only_drawn:
        cells = [cell for cell in cells if all(x.file_in(arguments.drawn).exists() for x in (cell, cell.reference))]
    if not cells:
        parser.error(f"{arguments.drawn} must hold drawn cells with --only-drawn, and holds none of those steps")
    figures: list[dict[str, Any]] = []
    for cell in cells:
        began = time.perf_counter()
        pictures, reference = (pictures_of(which, arguments.drawn) for which in (cell, cell.reference))
        figures.append({**asdict(cell), "schedule": cell.schedule, **compare(pictures, reference, cell.ranks)})
        print(f"{cell.name}: {figures[-1]['psnr']:.1f} dB, {time.perf_counter() - began:.0f} s", flush=True)
        write(figures, arguments.results)
    show(figures)
    plot(figures, arguments.results / "fidelity.png")
    contact_sheet(arguments.drawn, figures, arguments.results / "fidelity_pictures.jpg")


def compare(pictures: np.ndarray, reference: np.ndarray, ranks: int) -> dict[str, Any]:
    """Figures of a cell from its pictures and one rank's, both bytes [prompts, H, W, 3]."""
    found = likeness(torch.from_numpy(pictures), torch.from_numpy(reference))
    psnr, ssim = [min(each, IDENTICAL) for each in found.psnr], list(found.ssim)
    assert found.ms_ssim is not None, "native pictures are large enough"
    here, there = (border_difference(drawn, ranks) for drawn in (pictures, reference))
    return {
        "psnr": median(psnr),
        "worst_psnr": min(psnr),
        "ssim": median(ssim),
        "worst_ssim": min(ssim),
        "ms_ssim": median(found.ms_ssim),
        "worst_ms_ssim": min(found.ms_ssim),
        "seam": here / there if ranks > 1 else 1.0,
        "psnr_of_each": psnr,
        "ssim_of_each": ssim,
    }


def border_difference(pictures: np.ndarray, ranks: int) -> float:
    """Mean difference between the rows on either side of the borders between ranks; stripes are equally high."""
    height = pictures.shape[1] // ranks
    borders = np.arange(1, ranks) * height
    rows = pictures.astype(np.int16)
    return float(np.abs(rows[:, borders] - rows[:, borders - 1]).mean()) if ranks > 1 else 0.0


def write(figures: Sequence[dict[str, Any]], folder: Path) -> None:
    """Write `fidelity.json` with all figures, and `fidelity.csv` with a line for each cell."""
    contents = {
        "machine": machine(torch.device("cpu")),
        "seed": SEED,
        "prompts": held_out_prompts(),
        "cells": list(figures),
    }
    save(contents, folder / "fidelity.json")
    short = [{name: value for name, value in cell.items() if not isinstance(value, list)} for cell in figures]
    with replacing(folder / "fidelity.csv") as partial, partial.open("w", newline="") as stream:
        lines = csv.DictWriter(stream, short[0])
        lines.writeheader()
        lines.writerows(short)


def show(figures: Sequence[dict[str, Any]]) -> None:
    """Print a table for each number of steps: PSNR (the worst), SSIM and seam on 2, 4 and 8 ranks."""
    for steps in sorted({cell["steps"] for cell in figures}):
        table = Table(title=f"{steps} steps: median PSNR in dB (worst), SSIM, seam")
        for title in ("text", "schedule", "2 ranks", "4 ranks", "8 ranks"):
            table.add_column(title, no_wrap=True)
        cells = [cell for cell in figures if cell["steps"] == steps and cell["ranks"] > 1]
        for text_attention, warmup in dict.fromkeys((cell["text_attention"], cell["warmup_steps"]) for cell in cells):
            row = {
                cell["ranks"]: f"{cell['psnr']:.1f} ({cell['worst_psnr']:.1f}) {cell['ssim']:.3f} {cell['seam']:.2f}"
                for cell in cells
                if (cell["text_attention"], cell["warmup_steps"]) == (text_attention, warmup)
            }
            schedule = "sync" if warmup is None else f"stale, {warmup} warm-up steps"
            table.add_row(text_attention, schedule, *(row.get(ranks, "") for ranks in (2, 4, 8)))
        Console(width=125).print(table)


if __name__ == "__main__":
    main()
