"""Figures of alternatives.py: a table as Table 2, curves as Fig. 11, a contact sheet as Fig. 3."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import pyplot

SMOOTHED = 20
"""Points of a curve; each is a mean over its part of the steps."""
COLUMNS = ("pattern", "GFLOPs here", "GFLOPs, FLUX.1-dev", "paper's", "held out", "teacher's", "PSNR", "SSIM")


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown."""
    lines = [COLUMNS, ("---",) * len(COLUMNS)]
    for row in rows:
        printed = "" if row["printed"] is None else f"{row['printed']:.1f}"
        operations = f"{row['gflops']:.3g}", f"{row['gflops_flux']:.2f}", printed
        losses = f"{row['held_out']:.4f}", f"{row['held_out_teacher']:.4f}"
        lines.append((row["title"], *operations, *losses, f"{row['psnr']:.1f}", f"{row['ssim']:.3f}"))
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def plot(rows: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Distance to the teacher's prediction over the steps."""
    figure, axes = pyplot.subplots(figsize=(8, 5))
    axes.set_prop_cycle(color=pyplot.colormaps["tab20"].colors)
    for row in rows:
        steps, losses = np.array(row["curve"]).T
        parts = np.array_split(np.arange(len(steps)), min(SMOOTHED, len(steps)))
        axes.plot([steps[part].mean() for part in parts], [losses[part].mean() for part in parts], label=row["title"])
    axes.set(xlabel="steps", ylabel="squared distance to the teacher's prediction", yscale="log")
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(file, dpi=100, bbox_inches="tight")
    pyplot.close(figure)


def contact_sheet(pictures: Mapping[str, np.ndarray], prompts: Sequence[str], file: Path) -> None:
    """A column for each way to draw, a row for each prompt."""
    size = (1.8 * len(pictures), 2.0 * len(prompts))
    figure, panels = pyplot.subplots(len(prompts), len(pictures), figsize=size, squeeze=False)
    for (title, drawn), column in zip(pictures.items(), panels.T, strict=True):
        for picture, axes in zip(drawn, column, strict=True):
            axes.imshow(picture)
            axes.set_axis_off()
        column[0].set_title(title, fontsize=8)
    for prompt, axes in zip(prompts, panels[:, 0], strict=True):
        axes.text(0, 1.08 * axes.get_ylim()[0], prompt, fontsize=7)
    figure.subplots_adjust(wspace=0.03, hspace=0.14)
    figure.savefig(file, dpi=110, bbox_inches="tight", pil_kwargs={"quality": 88})
    pyplot.close(figure)
