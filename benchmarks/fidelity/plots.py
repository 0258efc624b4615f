"""The pictures of ranks.py: PSNR over ranks, and some drawings side by side."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib import pyplot

from benchmarks.fidelity.drawn import Cell, held_out_prompts, pictures_of

SHOWN_PROMPTS = (0, 1, 2, 3, 4, 5)
SHOWN = (
    ("one rank", Cell(steps=28, ranks=1, text_attention="exact")),
    ("exact, 8 ranks", Cell(steps=28, ranks=8, text_attention="exact")),
    ("average, 2", Cell(steps=28, ranks=2, text_attention="average")),
    ("average, 8", Cell(steps=28, ranks=8, text_attention="average")),
    ("stale (4), exact, 2", Cell(steps=28, ranks=2, text_attention="exact", warmup_steps=4)),
    ("stale (4), exact, 8", Cell(steps=28, ranks=8, text_attention="exact", warmup_steps=4)),
    ("stale (0), exact, 8", Cell(steps=28, ranks=8, text_attention="exact", warmup_steps=0)),
)
"""Columns of the contact sheet; in brackets: warm-up steps."""
STYLES = {"average": "--", "exact": "-", "full": ":"}
COLOURS = {None: "black", 0: "tab:red", 1: "tab:orange", 2: "tab:olive", 4: "tab:green", 8: "tab:blue"}
"""Colours by warm-up steps."""


def plot(figures: Sequence[dict[str, Any]], file: Path) -> None:
    """Median PSNR over the number of ranks, a panel for each number of steps."""
    numbers = sorted({cell["steps"] for cell in figures})
    figure, panels = pyplot.subplots(1, len(numbers), figsize=(4 * len(numbers), 4.5), sharey=True, squeeze=False)
    lines: dict[str, Any] = {}
    for steps, axes in zip(numbers, panels[0], strict=True):
        cells = [cell for cell in figures if cell["steps"] == steps and cell["ranks"] > 1]
        for text_attention, warmup in dict.fromkeys((cell["text_attention"], cell["warmup_steps"]) for cell in cells):
            points = [
                (cell["ranks"], cell["psnr"])
                for cell in cells
                if (cell["text_attention"], cell["warmup_steps"]) == (text_attention, warmup)
            ]
            label = text_attention if warmup is None else f"{text_attention}, stale after {warmup}"
            style = {"linestyle": STYLES[text_attention], "color": COLOURS[warmup], "marker": "o"}
            (lines[label],) = axes.plot(*zip(*sorted(points), strict=True), **style)
        axes.set(title=f"{steps} steps", xlabel="ranks", xscale="log", xticks=(2, 4, 8), xticklabels=(2, 4, 8))
        axes.minorticks_off()
    panels[0][0].set_ylabel("median PSNR against one rank, dB")
    figure.legend(lines.values(), lines.keys(), loc="center left", bbox_to_anchor=(0.92, 0.5), fontsize=8)
    figure.savefig(file, dpi=100, bbox_inches="tight")


def contact_sheet(drawn: Path, figures: Sequence[dict[str, Any]], file: Path) -> None:
    """Some prompts, a row each, as drawn in some cells, a column each, with PSNR beside one rank."""
    psnr = {
        (cell["ranks"], cell["text_attention"], cell["warmup_steps"]): cell["psnr_of_each"]
        for cell in figures
        if cell["steps"] == 28
    }
    columns = [(title, cell, psnr.get((cell.ranks, cell.text_attention, cell.warmup_steps))) for title, cell in SHOWN]
    columns = [column for column in columns if column[2] is not None]
    if not columns:
        return
    size = (1.8 * len(columns), 1.95 * len(SHOWN_PROMPTS))
    figure, panels = pyplot.subplots(len(SHOWN_PROMPTS), len(columns), figsize=size, squeeze=False)
    for (title, cell, found), column in zip(columns, panels.T, strict=True):
        pictures = pictures_of(cell, drawn)
        for prompt, axes in zip(SHOWN_PROMPTS, column, strict=True):
            axes.imshow(pictures[prompt])
            axes.set_axis_off()
            axes.set_title(title if axes is column[0] else "", fontsize=9)
            if cell.ranks > 1:
                axes.text(4, 16, f"{found[prompt]:.1f} dB", fontsize=7, color="white", backgroundcolor="#00000080")
    for prompt, axes in zip(SHOWN_PROMPTS, panels[:, 0], strict=True):
        axes.text(0, 272, held_out_prompts()[prompt], fontsize=7)
    figure.subplots_adjust(wspace=0.03, hspace=0.12)
    figure.savefig(file, dpi=110, bbox_inches="tight", pil_kwargs={"quality": 88})
