"""Curves of a training: a line of CSV for each update, and a picture of them where matplotlib is installed."""

import csv
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean
from typing import TextIO

from clear_dist.pictures import replacing
from clear_dist.training.trainer import Figures

HELD_OUT = ("held_out", "held_out_teacher")
SHOWN = ("total", "flow", "prediction", "attention", *HELD_OUT)
WIDTHS = 30
"""A curve is so many running means wide: single updates' losses differ by their times more than by what is learned."""


class Curves:
    """`losses.csv` and `losses.png` of an output folder."""

    def __init__(self, folder: Path, steps: int) -> None:
        """Go on after update `steps`; later lines are those of an interrupted run."""
        self._file, self._picture = folder / "losses.csv", folder / "losses.png"
        self._rows = [row for row in _read(self._file) if int(row["step"]) <= steps]
        with replacing(self._file) as partial, partial.open("w", newline="") as stream:
            _writer(stream).writeheader()
            _writer(stream).writerows(self._rows)

    def begin(self, held_out: tuple[float, float]) -> None:
        """A line of update 0, before anything is trained."""
        self._write({"step": "0"}, held_out)

    def add(self, figures: Figures, held_out: tuple[float, float] | None) -> None:
        self._write({name: f"{value:.6g}" for name, value in asdict(figures).items()}, held_out)

    def _write(self, row: dict[str, str], held_out: tuple[float, float] | None) -> None:
        row |= {name: f"{value:.6g}" for name, value in zip(HELD_OUT, held_out or (), strict=False)}
        self._rows.append(row)
        with self._file.open("a", newline="") as stream:
            _writer(stream).writerow(row)

    def draw(self) -> None:
        if find_spec("matplotlib") is None:
            return
        from matplotlib.figure import Figure

        figure = Figure(figsize=(10, 5), layout="constrained")
        axes = figure.subplots()
        for place, name in enumerate(SHOWN):
            held = [row for row in self._rows if row.get(name)]
            steps, losses = [int(row["step"]) for row in held], [float(row[name]) for row in held]
            label, colour = name.replace("_", " "), f"C{place}"
            if name in HELD_OUT:
                axes.plot(steps, losses, color=colour, label=label, marker="o", markersize=3)
            else:
                axes.plot(steps, losses, color=colour, linewidth=0.5, alpha=0.3)
                axes.plot(steps, _running_mean(losses), color=colour, label=label)
        axes.set(xlabel="updates", ylabel="loss: each update's faint, running means", yscale="log")
        figure.legend(loc="outside right upper")
        with replacing(self._picture) as partial:
            figure.savefig(partial)


def _running_mean(values: list[float]) -> list[float]:
    width = max(len(values) // WIDTHS, 1)
    return [fmean(values[max(end - width, 0) : end]) for end in range(1, len(values) + 1)]


def _writer(stream: TextIO) -> csv.DictWriter:
    return csv.DictWriter(stream, [*Figures.__dataclass_fields__, *HELD_OUT])


def _read(file: Path) -> list[dict[str, str]]:
    if not file.exists():
        return []
    with file.open(newline="") as stream:
        return [row for row in csv.DictReader(stream) if None not in row.values()]  # a line may be cut off
