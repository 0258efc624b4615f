"""An evaluation as JSON, CSV, a Markdown table and a sheet of pairs."""

import csv
import json
import math
from collections.abc import Mapping, Sequence
from io import StringIO
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from clear_dist.evaluate.figures import KINDS, Evaluation, worst_to_best
from clear_dist.observe.report import versions
from clear_dist.pictures import replacing
from clear_dist.request.compared import Sample, opened

SCHEMA = 1
SIDE, MARGIN, LABEL = 384, 8, 20
"""Pixels of a sheet: most of a picture's side, between pictures, above them."""
ARROWS = {True: " ↑", False: " ↓", None: ""}


def save(evaluation: Evaluation, samples: Sequence[Sample], file: Path) -> list[Path]:
    """Write `file` and, beside it, csv, md and, where pairs were compared, png; returns the files."""
    texts = {".json": as_json(evaluation), ".csv": as_csv(evaluation), ".md": as_table([evaluation])}
    written = []
    for ending, text in texts.items():
        written.append(file.with_suffix(ending))
        with replacing(written[-1]) as partial:
            partial.write_text(text, encoding="utf-8")
    if (sheet := sheet_of(evaluation, samples)) is not None:
        written.append(file.with_suffix(".png"))
        with replacing(written[-1]) as partial:
            sheet.save(partial)
    return written


def as_json(evaluation: Evaluation) -> str:
    """What is infinite or lacking is null."""
    whole: dict[str, Any] = {
        "schema": SCHEMA,
        "versions": versions(),
        "pictures": evaluation.pictures,
        "against": evaluation.against,
        "count": evaluation.count,
        "figures": {name: {"value": each.value, "note": each.note} for name, each in evaluation.figures.items()},
        "of_each": {name: _finite(each) for name, each in evaluation.of_each.items()},
    }
    return json.dumps(whole, indent=2, allow_nan=False) + "\n"


def as_csv(evaluation: Evaluation) -> str:
    """A line for each picture."""
    names = [name for name in KINDS if any(name in each for each in evaluation.of_each.values())]
    text = StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(["name", *names])
    lines.writerows([name, *(each.get(figure, "") for figure in names)] for name, each in evaluation.of_each.items())
    return text.getvalue()


def as_table(rows: Sequence[Evaluation]) -> str:
    """Markdown: a row for each evaluation, the figures that any of them has, and below why others are lacking."""
    shown = [name for name in KINDS if any(row.figures[name].value is not None for row in rows)]
    titles = [f"{KINDS[name].title}{ARROWS[KINDS[name].higher_is_better]}" for name in shown]
    lines = [["pictures", "against", "count", *titles], ["---"] * (3 + len(shown))]
    notes: dict[str, list[str]] = {}
    for row in rows:
        figures = [row.figures[name].value for name in shown]
        cells = ["-" if x is None else f"{x:.{KINDS[name].digits}f}" for name, x in zip(shown, figures, strict=True)]
        lines.append([row.pictures, row.against or "-", str(row.count), *cells])
        for name, figure in row.figures.items():
            if figure.note:
                notes.setdefault(figure.note, []).append(KINDS[name].title)
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    below = [f"- {', '.join(dict.fromkeys(names))}: {note}" for note, names in notes.items()]
    return "\n".join([table, "", *below]) + "\n"


def sheet_of(evaluation: Evaluation, samples: Sequence[Sample]) -> Image.Image | None:
    """Best, median and worst pair by PSNR, a row each, the picture left of its other; None: there are no pairs."""
    ranked = worst_to_best(evaluation)
    if not ranked:
        return None
    chosen = {"best": ranked[-1], "median": ranked[len(ranked) // 2], "worst": ranked[0]}
    by_name = {each.name: each for each in samples}
    rows = []
    for word, name in chosen.items():
        sample, psnr = by_name[name], evaluation.of_each[name]["psnr"]
        assert sample.other is not None
        rows.append((f"{word}: {name}, PSNR {psnr:.2f} dB", [_small(sample.picture), _small(sample.other)]))
    height = sum(LABEL + max(each.height for each in pair) + MARGIN for _, pair in rows)
    width = max(sum(each.width for each in pair) for _, pair in rows) + 3 * MARGIN
    sheet = Image.new("RGB", (width, height), "white")
    draw, top = ImageDraw.Draw(sheet), 0
    for label, (picture, other) in rows:
        draw.text((MARGIN, top + 4), label.encode("ascii", "replace").decode(), fill="black")
        sheet.paste(picture, (MARGIN, top + LABEL))
        sheet.paste(other, (2 * MARGIN + picture.width, top + LABEL))
        top += LABEL + max(picture.height, other.height) + MARGIN
    return sheet


def _small(file: Path) -> Image.Image:
    image = opened(file)
    image.thumbnail((SIDE, SIDE))
    return image


def _finite(figures: Mapping[str, float]) -> dict[str, float | None]:
    return {name: value if math.isfinite(value) else None for name, value in figures.items()}
