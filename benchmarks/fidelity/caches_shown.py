"""Table, curve and sheet of caches.py."""

from collections.abc import Mapping, Sequence
from os.path import relpath
from pathlib import Path
from typing import Any

from PIL import Image

from benchmarks.fidelity.embedded import put_in_page, sheet

COLUMNS = ("", "steps left out", "blocks that run", "time", "PSNR", "worst", "MS-SSIM")
KINDS = {"first-block": "o-", "taylor": "s-", "steps": "x--"}
WANTED = {"time": 0.6, "psnr": 35.0}
Figures = Sequence[Mapping[str, Any]]


def show(figures: Figures, pictures: Mapping[str, Image.Image], arguments: Any) -> None:
    """The table, also in the page with links to the curve and a sheet of one picture in all ways."""
    curve, whole = (arguments.results / f"caches.{ending}" for ending in ("png", "jpg"))
    plot(figures, curve)
    named = {row["way"]: f"{row['way']}, {row['time']:.2f}, {row['psnr']:.1f} dB" for row in figures}
    side = min(256, arguments.res)
    cells = [(named[way], picture.resize((side, side), Image.Resampling.LANCZOS)) for way, picture in pictures.items()]
    columns = 6
    sheet([cells[first : first + columns] for first in range(0, len(cells), columns)], whole)
    about = f"{arguments.res} px, {arguments.steps} steps, pictures in each way: {figures[0]['pictures']}."
    text = f"{about}\n\n{table(figures)}"
    print(text)
    if arguments.page is not None:
        links = (relpath(file, arguments.page.parent) for file in (curve, whole))
        named_links = zip(("time against PSNR and MS-SSIM", "one picture in all ways"), links, strict=True)
        text += "".join(f"\n![{title}]({link})\n" for title, link in named_links)
    put_in_page(arguments.page, "caches", text)


def table(figures: Figures) -> str:
    """Markdown."""
    lines = [COLUMNS, ("---",) * len(COLUMNS)]
    for row in figures[1:]:
        counts = f"{row['skipped']:g}", f"{row['blocks']:.2f}", f"{row['time']:.2f}"
        name = f"{row['number']:g} steps" if row["kind"] == "steps" else f"`{row['way']}`"
        scaled = f"{row['ms_ssim']:.4f}" if "ms_ssim" in row else ""
        lines.append((name, *counts, f"{row['psnr']:.1f}", f"{row['worst_psnr']:.1f}", scaled))
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def plot(figures: Figures, file: Path) -> None:
    """Likeness over time, a line for each kind of cache."""
    from matplotlib import pyplot

    names = {"psnr": "median PSNR to the picture without a cache, dB", "ms_ssim": "median MS-SSIM to it"}
    names = {score: label for score, label in names.items() if score in figures[0]}  # small pictures have no MS-SSIM
    canvas, panels = pyplot.subplots(1, len(names), figsize=(5.5 * len(names), 4.2), squeeze=False)
    for (score, label), axes in zip(names.items(), panels[0], strict=True):
        for kind, style in KINDS.items():
            those = [row for row in figures if row["kind"] == kind and row["skipped"] + (kind == "steps")]
            axes.plot([row["time"] for row in those], [row[score] for row in those], style, label=kind, markersize=5)
            for row in those:
                place = row["time"], row[score]
                axes.annotate(f"{row['number']:g}", place, xytext=(4, 4), textcoords="offset points", fontsize=7)
        axes.axvline(WANTED["time"], color="grey", linestyle=":")
        axes.set(xlabel="time / time without a cache", ylabel=label)
        axes.grid(alpha=0.3)
    panels[0, 0].axhline(WANTED["psnr"], color="grey", linestyle=":")
    panels[0, 0].legend(fontsize=8)
    canvas.tight_layout()
    canvas.savefig(file, dpi=90)
    pyplot.close(canvas)
