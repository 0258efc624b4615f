"""Figures of locality.py: shares in a circle, attention by relative position as in Fig. 4, pictures as in Fig. 5."""

from collections.abc import Mapping, Sequence
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import pyplot
from matplotlib.colors import LogNorm

from benchmarks.fidelity.kept import FULL
from benchmarks.fidelity.shares import Look, together, uniform

Looks = Mapping[tuple[int, int], Look]
"""By step and layer."""
KINDS = ("clipped", "raised", "window", "distilled")
SHOWN = 4
"""Prompts of the contact sheet."""
SCALE = 1e-2, 1e2
"""Colours of maps: attention of a pair over that of uniform attention."""


def by_layer(looks: Looks) -> dict[int, Look]:
    layers = sorted({layer for _, layer in looks})
    return {layer: together([look for (_, of), look in looks.items() if of == layer]) for layer in layers}


def table(looks: Looks, names: Sequence[str], rows: Sequence[Mapping[str, Any]], side: int) -> str:
    """Markdown: shares in a circle by layer and by step, then a line for each radius with all ways to draw."""
    radii = sorted({row["radius"] for row in rows if row["radius"] is not None})
    return "\n".join([_shares(looks, names, radii, side), _scores(looks, rows, radii, side)])


def _shares(looks: Looks, names: Sequence[str], radii: Sequence[int], side: int) -> str:
    head = ["share of attention to the image", "text", *(f"r = {radius}" for radius in radii)]
    lines = [head, ["---"] * len(head)]
    for layer, look in by_layer(looks).items():
        lines.append([f"{names[layer]}, mean (least local head)", f"{look.text.mean():.2f}", *_cells(look, radii)])
    for step in sorted({step for step, _ in looks}):
        look = _all_heads([each for (at, _), each in looks.items() if at == step])
        lines.append([f"step {step + 1}, all layers", f"{look.text.mean():.2f}", *_cells(look, radii)])
    everywhere = uniform(side, side)
    lines.append(["if it were uniform", "", *(f"{float(everywhere.within(radius)):.2f}" for radius in radii)])
    return _markdown(lines)


def _cells(look: Look, radii: Sequence[int]) -> list[str]:
    return [f"{shares.mean():.2f} ({shares.min():.2f})" for shares in map(look.within, radii)]


def _all_heads(looks: Sequence[Look]) -> Look:
    """One with the heads of all layers."""
    return Look(text=torch.cat([look.text for look in looks]), offsets=torch.cat([look.offsets for look in looks]))


def _scores(looks: Looks, rows: Sequence[Mapping[str, Any]], radii: Sequence[int], side: int) -> str:
    head = ["r", "attention within, over uniform's", *KINDS]
    heads, everywhere = _all_heads(list(by_layer(looks).values())), uniform(side, side)
    (original,) = (row for row in rows if row["kind"] == FULL)
    lines = [head, ["---"] * len(head), ["full attention", "", *[_score(original)] * len(KINDS)]]
    for radius in radii:
        there = {kind: [row for row in rows if (row["kind"], row["radius"]) == (kind, radius)] for kind in KINDS}
        shares = f"{heads.within(radius).mean():.2f} / {float(everywhere.within(radius)):.2f}"
        lines.append([str(radius), shares, *("; ".join(map(_score, each)) for each in there.values())])
    return "PSNR in dB against full attention, SSIM, share of attributes shown:\n\n" + _markdown(lines)


def _score(row: Mapping[str, Any]) -> str:
    psnr = "" if row["kind"] == FULL else f"{row['psnr']:.1f}, {row['ssim']:.2f}, "
    pooled = " (with pooled keys)" if "_down_" in row["name"] else ""
    return f"{psnr}{100 * row['all']:.0f} %{pooled}"


def _markdown(lines: Sequence[Sequence[str]]) -> str:
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def plot(looks: Looks, names: Sequence[str], side: int, file: Path) -> None:
    """Share in a circle over its radius: a panel for each layer with a line for each head, a last one by steps."""
    layers, radii = by_layer(looks), list(range(1, ceil(1.5 * side)))
    columns = ceil((len(layers) + 1) ** 0.5)
    size = columns, ceil((len(layers) + 1) / columns)
    figure, panels = pyplot.subplots(
        size[1], columns, figsize=(3.1 * columns, 2.7 * size[1]), sharex=True, sharey=True, squeeze=False
    )
    by_chance = [float(uniform(side, side).within(radius)) for radius in radii]
    places = panels.flatten()
    for (layer, look), axes in zip(layers.items(), places, strict=False):
        for head, shares in enumerate(torch.stack(list(map(look.within, radii)), dim=1)):
            axes.plot(radii, shares, linewidth=1.2, label=f"head {head + 1}")
        axes.set_title(names[layer], fontsize=9)
    steps, last = sorted({step for step, _ in looks}), places[len(layers)]
    for step in steps:
        look = _all_heads([each for (at, _), each in looks.items() if at == step])
        last.plot(radii, [float(look.within(radius).mean()) for radius in radii], label=f"step {step + 1}")
    last.set_title("all layers, by step", fontsize=9)
    for axes in places[: len(layers) + 1]:
        axes.plot(radii, by_chance, color="black", linestyle=":", linewidth=1, label="uniform")
        axes.grid(alpha=0.3)
    for axes in (places[0], last):
        axes.legend(fontsize=6, loc="lower right")
    for axes in places[len(layers) + 1 :]:
        axes.set_axis_off()
    figure.supxlabel("radius r in tokens", fontsize=9)
    figure.supylabel("share of attention to the image less than r away", fontsize=9)
    figure.tight_layout()
    figure.savefig(file, dpi=100)
    pyplot.close(figure)


def plot_maps(looks: Looks, names: Sequence[str], side: int, file: Path) -> None:
    """Attention of a pair by relative position, the query in the middle: a row for each layer, a column each head."""
    layers, chance = by_layer(looks), uniform(side, side).offsets[0]
    heads = max(len(look.text) for look in layers.values())
    size = 1.25 * heads + 0.8, 1.3 * len(layers) + 0.5
    figure, panels = pyplot.subplots(len(layers), heads, figsize=size, squeeze=False)
    extent = (0.5 - side, side - 0.5, side - 0.5, 0.5 - side)
    for (layer, look), row in zip(layers.items(), panels, strict=True):
        to_image = look.offsets / look.offsets.sum(dim=(1, 2), keepdim=True)
        for head, (offsets, axes) in enumerate(zip(to_image / chance, row, strict=True)):
            image = axes.imshow(offsets.clamp(*SCALE), norm=LogNorm(*SCALE), cmap="RdBu_r", extent=extent)
            axes.set(xticks=[], yticks=[])
            if layer == 0:
                axes.set_title(f"head {head + 1}", fontsize=8)
        row[0].set_ylabel(names[layer].replace(" ", "\n"), fontsize=7)
    bar = figure.colorbar(image, ax=panels, fraction=0.03, pad=0.02)
    bar.set_label("attention of a pair, over uniform attention", fontsize=8)
    figure.savefig(file, dpi=100, bbox_inches="tight")
    pyplot.close(figure)


def contact_sheet(
    drawn: Mapping[str, np.ndarray], rows: Sequence[Mapping[str, Any]], prompts: Sequence[str], file: Path
) -> None:
    """A column for each way to draw, a row for each of some prompts."""
    shown = prompts[:SHOWN]
    size = 1.5 * len(rows), 1.75 * len(shown)
    figure, panels = pyplot.subplots(len(shown), len(rows), figsize=size, squeeze=False)
    for row, column in zip(rows, panels.T, strict=True):
        column[0].set_title(_title(row), fontsize=9)
        for picture, axes in zip(drawn[row["name"]], column, strict=False):
            axes.imshow(picture)
            axes.set_axis_off()
    for prompt, axes in zip(shown, panels[:, 0], strict=True):
        axes.text(0, 1.13 * axes.get_ylim()[0], prompt, fontsize=9)
    figure.subplots_adjust(wspace=0.03, hspace=0.2)
    figure.savefig(file, dpi=90, bbox_inches="tight")
    pyplot.close(figure)


def _title(row: Mapping[str, Any]) -> str:
    if row["kind"] == FULL:
        return "full attention"
    words = {"clipped": "clipped to", "raised": "raised to", "window": "window r =", "distilled": "distilled r ="}
    pooled = " + pooled" if "_down_" in row["name"] else ""
    return f"{words[row['kind']]} {row['radius']}{pooled}\n{row['psnr']:.1f} dB"
