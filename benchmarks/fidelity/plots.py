"""The pictures of ranks.py: PSNR over ranks, and some drawings side by side."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib import pyplot

from benchmarks.fidelity.drawn import Cell, Drawn
from benchmarks.fidelity.kept import FULL, held_out_prompts

SHOWN_PROMPTS = 5
STYLES = {"average": "--", "exact": "-"}
COLOURS = {None: "black", 0: "tab:red", 1: "tab:orange", 2: "tab:olive", 4: "tab:green", 8: "tab:blue"}
"""Colours by warm-up steps; others have one together."""
Figures = Sequence[dict[str, Any]]


def plot(figures: Figures, file: Path) -> None:
    """Median PSNR over the number of ranks, a panel for each weights and number of steps."""
    shown = [each for each in figures if each["ranks"] > 1]
    ranks = sorted({each["ranks"] for each in shown})
    kinds = dict.fromkeys((each["weights"], each["steps"]) for each in shown)
    if not kinds:
        return
    figure, panels = pyplot.subplots(1, len(kinds), figsize=(3.2 * len(kinds), 3.8), sharey=True, squeeze=False)
    lines: dict[str, Any] = {}
    for (weights, steps), axes in zip(kinds, panels[0], strict=True):
        cells = [each for each in shown if (each["weights"], each["steps"]) == (weights, steps)]
        for text, warmup in dict.fromkeys((each["text_attention"], each["warmup_steps"]) for each in cells):
            points = [
                (each["ranks"], each["psnr"])
                for each in cells
                if (each["text_attention"], each["warmup_steps"]) == (text, warmup)
            ]
            label = text if warmup is None else f"{text}, stale after {warmup}"
            style = {"linestyle": STYLES[text], "color": COLOURS.get(warmup, "tab:purple"), "marker": "o"}
            (lines[label],) = axes.plot(*zip(*sorted(points), strict=True), **style)
        axes.set(xscale="log", xticks=ranks, xticklabels=ranks)
        axes.set_title(f"{weights}\n{steps} steps", fontsize=9)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    panels[0][0].set_ylabel("median PSNR against one rank, dB")
    figure.supxlabel("ranks", fontsize=9)
    figure.tight_layout()
    figure.legend(lines.values(), lines.keys(), loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8)
    figure.savefig(file, dpi=100, bbox_inches="tight")
    pyplot.close(figure)


def contact_sheet(drawn: Drawn, figures: Figures, file: Path) -> None:
    """Some prompts, a row each: one rank of each weights, and the most ranks beside it, with PSNR against that."""
    columns = _columns(figures)
    prompts = held_out_prompts(drawn.prompts)[:SHOWN_PROMPTS]
    size = (1.5 * len(columns), 1.75 * len(prompts))
    figure, panels = pyplot.subplots(len(prompts), len(columns), figsize=size, squeeze=False)
    for each, column in zip(columns, panels.T, strict=True):
        cell = _cell(each)
        for number, (picture, axes) in enumerate(zip(drawn.pictures(cell), column, strict=False)):
            axes.imshow(picture)
            axes.set_axis_off()
            if cell.ranks > 1:
                label = f"{each['psnr_of_each'][number]:.1f} dB"
                axes.text(
                    0.03, 0.05, label, fontsize=7, color="white", backgroundcolor="#00000080", transform=axes.transAxes
                )
        column[0].set_title(_title(cell), fontsize=8)
    for prompt, axes in zip(prompts, panels[:, 0], strict=True):
        axes.text(0, 1.13 * axes.get_ylim()[0], prompt, fontsize=9)
    figure.subplots_adjust(wspace=0.03, hspace=0.2)
    figure.savefig(file, dpi=90, bbox_inches="tight")
    pyplot.close(figure)


def _columns(figures: Figures) -> Figures:
    """Figures of the first number of steps, for each weights: one rank, then all that the most ranks have."""
    here = [each for each in figures if each["steps"] == figures[0]["steps"]]
    most = {each["weights"]: max(x["ranks"] for x in here if x["weights"] == each["weights"]) for each in here}
    return [each for each in here if each["ranks"] == 1 or each["ranks"] == most[each["weights"]]]


def _cell(each: dict[str, Any]) -> Cell:
    return Cell(**{name: each[name] for name in ("weights", "steps", "ranks", "text_attention", "warmup_steps")})


def _title(cell: Cell) -> str:
    weights = "full attention" if cell.weights == FULL else cell.weights.removeprefix("clear_local_").replace("_", " ")
    weights = weights if cell.weights == FULL else f"r = {weights}"
    if cell.ranks == 1:
        return f"{weights}\none rank"
    late = "" if cell.warmup_steps is None else f", stale ({cell.warmup_steps})"
    return f"{cell.ranks} ranks\n{cell.text_attention}{late}"
