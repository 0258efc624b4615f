"""How much do pictures drawn on several ranks differ from those of one rank (our counterpart of Table 6)?

    python -m benchmarks.fidelity.ranks --results fidelity
    python -m benchmarks.fidelity.ranks --model FOLDER --clear-weights clear_local_8.safetensors \\
        clear_local_4.safetensors clear_local_8_down_4.safetensors --res 512 --results fidelity

Draws held-out prompts with a model's full attention and with each CLEAR file on 1, 2, 4 and 8 ranks: with both text
reductions, and with `exact` in the stale schedule (drawn.py). Each picture is compared with the same weights' on one
rank, and that one with full attention's. Drawn cells are kept, so that an interrupted run goes on (delete them after a
change of the engine); other weights or settings in one folder are refused. Results are written after each number of
ranks: fidelity.json, .csv, .md (Table 6 beside the paper's), .png, fidelity_pictures.png.

- PSNR in dB, SSIM and MS-SSIM of the 8-bit pictures, by torchmetrics: medians over prompts, and the worst. (SSIM in
  results of 2026-11-21 is scikit-image's, whose window is not Gaussian.)
- attributes: how often pictures show what prompts ask for (evaluate/attributes.py), beside one rank's.
- seam: difference of rows across the borders between ranks, over the same on one rank. 1: no seam.
- NA: there are fewer rows of down-sampled keys than ranks.
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

from benchmarks.fidelity.drawn import SEED, Cell, Drawn, planned
from benchmarks.fidelity.kept import FULL, digest, held_out_prompts, keep_settings, weights_by_name
from benchmarks.fidelity.plots import contact_sheet, plot
from benchmarks.fidelity.table6 import table
from benchmarks.lib.counts import TOKEN
from benchmarks.lib.flags import Parser, pixels, whole_number
from benchmarks.lib.machine import machine, save
from clear_dist import demo
from clear_dist.evaluate.attributes import accuracy
from clear_dist.evaluate.scores import likeness
from clear_dist.geometry import cut_in_stripes
from clear_dist.pictures import replacing

IDENTICAL = 110.0
"""dB of two equal pictures; two that differ by one in a single value are at 101."""


def main() -> None:
    arguments, drawn = parsed()
    figures: list[dict[str, Any]] = []
    for weights in (FULL, *drawn.files):
        for cells in planned(weights, arguments.steps, arguments.ranks, arguments.warmup_steps):
            began = time.perf_counter()
            if cells[0].ranks > drawn.most_ranks(weights):
                figures += [{**asdict(cell), "schedule": cell.schedule, "psnr": None} for cell in cells]
                continue
            if not arguments.only_drawn:
                drawn.draw(cells)
            there = [cell for cell in cells if drawn.has(cell) and drawn.has(cell.reference)]
            found = [figures_of(cell, drawn) for cell in there]
            figures += found
            write(figures, drawn, arguments.results)
            for cell, each in zip(there, found, strict=True):
                print(f"{cell.name}: {each['psnr']:.1f} dB, attributes {each['attributes']:.3f}", flush=True)
            print(f"  {time.perf_counter() - began:.0f} s", flush=True)
    measured = [each for each in figures if each["psnr"] is not None]
    plot(measured, arguments.results / "fidelity.png")
    contact_sheet(drawn, measured, arguments.results / "fidelity_pictures.png")
    print(table(figures))


def parsed() -> tuple[Any, Drawn]:
    parser = Parser(__doc__)
    parser.add_argument("--model", type=Path, default=demo.WEIGHTS, help="a pipeline's folder (the embedded)")
    parser.add_argument(
        "--clear-weights", type=Path, nargs="+", default=[demo.CLEAR_WEIGHTS], help="files (the embedded model's)"
    )
    parser.add_argument("--results", type=Path, default=Path("fidelity"), help="tables, plot and contact sheet")
    parser.add_argument("--drawn", type=Path, help="the cells' pictures, 6 MB each at 256 px (RESULTS/drawn)")
    parser.add_argument("--res", type=pixels, default=demo.NATIVE_SIZE, help="side of the pictures (the demo's)")
    parser.add_argument("--prompts", type=whole_number, default=32, help="held-out captions (32)")
    parser.add_argument("--ranks", type=whole_number, nargs="+", default=[1, 2, 4, 8], help="beside one (1 2 4 8)")
    parser.add_argument("--steps", type=whole_number, nargs="+", default=[28], help="of drawing (28)")
    parser.add_argument(
        "--warmup-steps", type=int, nargs="+", default=[4], help="of the stale schedule, several or one (4)"
    )
    parser.add_argument("--only-drawn", action="store_true", help="draw nothing, compare the cells that are there")
    arguments = parser.parse_args()
    folder = arguments.drawn or arguments.results / "drawn"
    try:
        files = weights_by_name(arguments.clear_weights)
        digests = {name: digest(file) for name, file in {FULL: arguments.model, **files}.items()}
        keep_settings(folder, {"res": arguments.res, "prompts": arguments.prompts, "seed": SEED, **digests})
    except ValueError as error:
        parser.error(str(error))
    arguments.results.mkdir(parents=True, exist_ok=True)
    drawn = Drawn(model=arguments.model, files=files, res=arguments.res, prompts=arguments.prompts, folder=folder)
    return arguments, drawn


def figures_of(cell: Cell, drawn: Drawn) -> dict[str, Any]:
    pictures, reference = (drawn.pictures(each) for each in (cell, cell.reference))
    found = {**asdict(cell), "schedule": cell.schedule, **compare(pictures, reference, cell.ranks)}
    prompts = held_out_prompts(drawn.prompts)
    shown, alone = (accuracy(torch.from_numpy(each), prompts) for each in (pictures, reference))
    to_full = None
    if cell.ranks == 1 and cell.weights != FULL and drawn.has(cell.teacher):
        compared = likeness(torch.from_numpy(pictures), torch.from_numpy(drawn.pictures(cell.teacher)))
        to_full = min(median(compared.psnr), IDENTICAL)
    return found | {"attributes": shown["all"], "attributes_one_rank": alone["all"], "psnr_to_full": to_full}


def compare(pictures: np.ndarray, reference: np.ndarray, ranks: int) -> dict[str, Any]:
    """Figures of a cell from its pictures and one rank's, both bytes [prompts, H, W, 3]."""
    found = likeness(torch.from_numpy(pictures), torch.from_numpy(reference))
    psnr, ssim = [min(each, IDENTICAL) for each in found.psnr], list(found.ssim)
    here, there = (border_difference(drawn, ranks) for drawn in (pictures, reference))
    return {
        "psnr": median(psnr),
        "worst_psnr": min(psnr),
        "ssim": median(ssim),
        "worst_ssim": min(ssim),
        "ms_ssim": median(found.ms_ssim) if found.ms_ssim else None,
        "worst_ms_ssim": min(found.ms_ssim) if found.ms_ssim else None,
        "seam": here / there if ranks > 1 else 1.0,
        "psnr_of_each": psnr,
        "ssim_of_each": ssim,
    }


def border_difference(pictures: np.ndarray, ranks: int) -> float:
    """Mean difference between the rows on either side of the borders between ranks."""
    stripes = cut_in_stripes(pictures.shape[1] // TOKEN, ranks)
    borders = np.array([TOKEN * stripe.start for stripe in stripes[1:]])
    rows = pictures.astype(np.int16)
    return float(np.abs(rows[:, borders] - rows[:, borders - 1]).mean()) if ranks > 1 else 0.0


def write(figures: Sequence[dict[str, Any]], drawn: Drawn, folder: Path) -> None:
    """`fidelity.json` with all figures, `fidelity.csv` with a line for each cell, `fidelity.md` as Table 6."""
    contents = {
        "machine": machine(torch.device("cpu")),
        "seed": SEED,
        "res": drawn.res,
        "prompts": held_out_prompts(drawn.prompts),
        "cells": list(figures),
    }
    save(contents, folder / "fidelity.json")
    short = [{name: value for name, value in cell.items() if not isinstance(value, list)} for cell in figures]
    with replacing(folder / "fidelity.csv") as partial, partial.open("w", newline="") as stream:
        lines = csv.DictWriter(stream, short[0])
        lines.writeheader()
        lines.writerows(short)
    with replacing(folder / "fidelity.md") as partial:
        partial.write_text(table(figures))


if __name__ == "__main__":
    main()
