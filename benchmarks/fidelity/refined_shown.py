"""Table and sheets of refined.py."""

from collections.abc import Mapping, Sequence
from os.path import relpath
from typing import Any

from PIL import Image

from benchmarks.fidelity.embedded import put_in_page, sheet

COLUMNS = (
    "px", "refined by", "steps a stage", "like the stage below, PSNR", "MS-SSIM", "like the first, PSNR",
    "detail beyond it", "detail beyond the first", "shown", "processor seconds", "times SDEdit 0.3's",
)  # fmt: skip


def show(
    figures: Sequence[Mapping[str, Any]], sheets: Mapping[int, list[list[tuple[str, Image.Image]]]], arguments: Any
) -> None:
    """A sheet for each size, and the page's part: the table and links to the sheets."""
    counts = ", ".join(f"{row['pictures']} of {row['res']} px" for row in figures if row["way"] == figures[0]["way"])
    text = f"Pictures in each way: {counts}.\n\n{table(figures)}"
    print(text)
    for res, rows in sheets.items():
        file = arguments.results / f"refined_{res}.jpg"
        sheet(rows, file)
        if arguments.page is not None:
            text += f"\n![{res} px, refined in five ways]({relpath(file, arguments.page.parent)})\n"
    put_in_page(arguments.page, "refined", text)


def table(figures: Sequence[Mapping[str, Any]]) -> str:
    """Markdown."""
    lines = [COLUMNS, ("---",) * len(COLUMNS)]
    for row in figures:
        cells = [str(row["res"]), row["way"], str(row["steps"] or "")]
        finer = f"{row['detail']:.2f}", f"{row['detail_first']:.2f}"
        if "psnr" not in row:
            lines.append((*cells, "", "", "", *finer, "", "", ""))
            continue
        (first,) = (each for each in figures if each["res"] == row["res"] and each["way"] == figures[0]["way"])
        scores = f"{row['psnr']:.1f}", f"{row['ms_ssim']:.3f}", f"{row['psnr_first']:.1f}"
        took = f"{row['processor_seconds']:.0f}", f"{row['processor_seconds'] / first['processor_seconds']:.2f}"
        lines.append((*cells, *scores, *finer, f"{row['shown']:.0%}", *took))
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)
