"""Figures of alternatives.py: a table as Table 2, curves as Fig. 11, a contact sheet as Fig. 3."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

SMOOTHED = 20
"""Points of a curve; each is a mean over its part of the steps."""
NAMED = {"all": "with distillation", "flow": "flow alone"}
COLUMNS = (
    "pattern", "losses", "GFLOPs here", "GFLOPs, FLUX.1-dev", "paper's", "held out", "teacher's", "PSNR", "SSIM",
    "shown", "teacher's",
)  # fmt: skip


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown."""
    lines = [COLUMNS, ("---",) * len(COLUMNS)]
    for row in rows:
        printed = "" if row["printed"] is None else f"{row['printed']:.1f}"
        operations = f"{row['gflops']:.3g}", f"{row['gflops_flux']:.2f}", printed
        losses = f"{row['held_out']:.4f}", f"{row['held_out_teacher']:.4f}"
        pictures = f"{row['psnr']:.1f}", f"{row['ssim']:.3f}", f"{row['shown']:.0%}", f"{row['shown_teacher']:.0%}"
        lines.append((row["title"], NAMED[row["losses"]], *operations, *losses, *pictures))
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def plot(rows: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Distance to the teacher's prediction over the steps, a panel for each kind of losses."""
    from matplotlib import pyplot

    panels = [(losses, [row for row in rows if row["losses"] == losses]) for losses in NAMED]
    panels = [panel for panel in panels if panel[1]]
    figure, columns = pyplot.subplots(1, len(panels), figsize=(6 * len(panels), 5), sharey=True, squeeze=False)
    for (losses, those), axes in zip(panels, columns[0], strict=True):
        axes.set_prop_cycle(color=pyplot.colormaps["tab20"].colors)
        for row in those:
            steps, distances = np.array(row["curve"]).T
            parts = np.array_split(np.arange(len(steps)), min(SMOOTHED, len(steps)))
            means = [[values[part].mean() for part in parts] for values in (steps, distances)]
            axes.plot(*means, label=row["title"])
        axes.set(title=NAMED[losses], xlabel="steps", yscale="log")
    columns[0, 0].set_ylabel("squared distance to the teacher's prediction")
    columns[0, -1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(file, dpi=100, bbox_inches="tight")
    pyplot.close(figure)


def contact_sheet(pictures: Mapping[str, np.ndarray], prompts: Sequence[str], file: Path) -> None:
    """A column for each way to draw, a row for each prompt."""
    from matplotlib import pyplot

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
