"""The base of table7.py and table10.py: settings, cells and their origin, limits of a run, flags, files of results."""

import argparse
import csv
import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch
from rich.console import Console

from benchmarks.lib.counts import FLUX, Model, Part, Window, attention_work, linear_work, middle_part, traffic
from benchmarks.lib.flags import Parser, pixels, positive, whole_number
from benchmarks.lib.machine import machine
from benchmarks.lib.steps import SMALL, Runs
from clear_dist.observe.report import write
from clear_dist.options import Schedule

Origin = Literal["measured", "projected", "too long", "too large", "not possible"]
STALE = ", stale"
"""Ending of the names of CLEAR's settings in the stale schedule."""
TERA, GIGA = 1e12, 1e9
ASSUMED_SHARE_OF_PEAK = 0.1
"""Guess for a setting that was not measured yet, to predict whether it takes too long."""
ACTIVATIONS_PER_TOKEN, HALOS_PER_TOKEN = 18, 4
"""Values per token, in units of the channels: 28.7 GB for FLUX at 8192 px; keys and values received, then joined."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A row of the tables."""

    name: str
    window: Window
    schedule: Schedule = "sync"

    @property
    def unmeasured(self) -> int:
        """Steps at the start of a generation, until the schedule is in full swing."""
        return 2 if self.schedule == "stale" else 1


FULL = Setting(name="full attention", window="full")


def windows(radii: Sequence[int], schedule: Schedule = "sync") -> list[Setting]:
    suffix = STALE if schedule == "stale" else ""
    return [Setting(name=f"CLEAR r = {radius}{suffix}", window=radius, schedule=schedule) for radius in radii]


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A figure and its origin: one setting, size and number of ranks."""

    setting: str
    window: Window
    side: int
    ranks: int
    origin: Origin
    seconds: list[float] = field(default_factory=list)
    """Seconds of a step, one for each repetition."""
    note: str = ""
    peak_bytes: int = 0
    work: int = 0
    """FLOP of one rank in a step."""
    share_seconds: list[float] = field(default_factory=list)
    """Measured seconds of the share that a projection starts from."""
    link_bytes: float = 0.0
    """Bytes each way through the rank's link, in a projection."""

    @property
    def median(self) -> float | None:
        return median(self.seconds) if self.seconds else None

    @property
    def rate(self) -> float | None:
        """FLOP/s of one rank."""
        return self.work / self.median if self.median else None

    def row(self, peak: float) -> dict[str, Any]:
        """The cell's line in files; `peak`: FLOP/s of a device."""
        seconds, rate = self.median, self.rate
        return {
            "setting": self.setting,
            "side_px": self.side,
            "ranks": self.ranks,
            "origin": self.origin,
            "seconds_per_step": seconds,
            "teraflops_per_second_and_rank": rate and rate / TERA,
            "share_of_peak": rate and rate / peak,
            "peak_memory_bytes": self.peak_bytes or None,
            "note": self.note,
        }


def work_of(model: Model, part: Part, schedule: Schedule = "sync") -> int:
    return linear_work(model, part, schedule) + attention_work(model, part, schedule)


def cell_of(setting: Setting, side: int, ranks: int, runs: Runs, model: Model) -> Cell:
    """The cell of measured runs, or of their error."""
    name: dict[str, Any] = {"setting": setting.name, "window": setting.window, "side": side, "ranks": ranks}
    if runs.error:
        memory = runs.error == "out of memory"
        return Cell(**name, origin="too large" if memory else "not possible", note=runs.error)
    work = work_of(model, middle_part(side, ranks, setting.window), setting.schedule)
    return Cell(**name, origin="measured", seconds=runs.seconds, peak_bytes=runs.peak_bytes, work=work)


@dataclass
class Limits:
    """Bounds on what is measured: seconds of a cell's repetitions, and the device's memory."""

    model: Model
    seconds: float
    repetitions: int
    peak_rate: float
    free_bytes: int
    rates: dict[Window, float] = field(default_factory=dict)
    """FLOP/s of each window, from its last measurement."""

    def learn(self, window: Window, cell: Cell) -> None:
        if cell.rate is not None:
            self.rates[window] = cell.rate

    def predicted_seconds(self, part: Part, steps: int) -> float:
        """Seconds of all repetitions, from the rate of the same window before."""
        rate = self.rates.get(part.window, ASSUMED_SHARE_OF_PEAK * self.peak_rate)
        return work_of(self.model, part) / rate * steps * self.repetitions

    def why_not(self, setting: Setting, part: Part, *, steps: int, processes: int = 1) -> tuple[Origin, str] | None:
        """Origin and note of a cell predicted to be beyond the limits; None for one within.

        Args:
            steps: steps of each generation.
            processes: number of processes that share the memory.
        """
        seconds = self.predicted_seconds(part, steps)
        if seconds > self.seconds:
            return "too long", f"predicted {seconds:.0f} s for all repetitions, the limit is {self.seconds:.0f} s"
        needed = activation_bytes(self.model, part, setting.schedule) * processes
        if needed > self.free_bytes:
            return "too large", f"predicted {needed / GIGA:.1f} GB, free are {self.free_bytes / GIGA:.1f} GB"
        return None


def activation_bytes(model: Model, part: Part, schedule: Schedule) -> int:
    """Rough bytes of a step besides the weights."""
    halo_tokens = (len(part.plan.extended) - len(part.plan.own)) * part.grid[1]
    numbers = ACTIVATIONS_PER_TOKEN * (part.tokens + model.text_tokens) + HALOS_PER_TOKEN * halo_tokens
    return numbers * model.channels * model.itemsize + stale_bytes(model, part, schedule)


def stale_bytes(model: Model, part: Part, schedule: Schedule) -> int:
    """Bytes of the halos that a rank keeps from step to step."""
    return traffic(model, part, schedule).halos_received if schedule == "stale" else 0


def free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return 1024 * int(Path("/proc/meminfo").read_text().split("MemAvailable:")[1].split()[0])


def parser_of(description: str | None) -> Parser:
    """A parser with the flags of both tables."""
    parser = Parser(description)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cuda", "cpu"))
    parser.add_argument("--model", choices=("FLUX", "small"), help="FLUX on CUDA, small on a CPU")
    parser.add_argument("--sides", type=pixels, nargs="+", help="of square images, in pixels")
    parser.add_argument("--radii", type=whole_number, nargs="+", default=[8, 16, 32], help="in tokens")
    parser.add_argument("--repetitions", type=whole_number, default=3)
    parser.add_argument("--cell-seconds", type=positive, help="limit for all repetitions; longer cells are left out")
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, default=False, help="everyone's blocks, by torch.compile"
    )
    parser.add_argument("--folder", type=Path, help="for the results: .json, .csv and .png")
    parser.add_argument("--again", action="store_true", help="show and plot what --folder holds; nothing is measured")
    return parser


DEFAULTS: dict[str, dict[str, Any]] = {
    "cuda": {"model": "FLUX", "sides": [1024, 2048, 4096, 8192, 16384], "cell_seconds": 900.0},
    "cpu": {"model": "small", "sides": [512, 1024, 2048], "cell_seconds": 120.0},
}
"""Defaults of flags, by device."""


def parse(parser: Parser, name: str) -> argparse.Namespace:
    """The flags; `name`: of the table's files."""
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a GPU that torch can see; nearest: --device cpu")
    if options.folder is not None and find_spec("matplotlib") is None:
        parser.error("--folder is for plots too, and there is no matplotlib: pip install -e '.[bench]'")
    if options.again and not (options.folder and (options.folder / f"{name}.json").is_file()):
        parser.error(f"--again needs the {name}.json of a run before, got --folder {options.folder}")
    for name, value in DEFAULTS[options.device].items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    return options


def model_and_dtype(options: argparse.Namespace) -> tuple[Model, torch.dtype]:
    dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
    return replace(FLUX if options.model == "FLUX" else SMALL, itemsize=dtype.itemsize), dtype


COMPILED = {
    False: "nothing compiled but kernels of attention",
    True: "all compiled (torch.compile, dynamic shapes): others' blocks, of ours what lies between messages",
}


def header_of(options: argparse.Namespace, limits: Limits, device: torch.device) -> dict[str, Any]:
    """Facts saved beside the cells."""
    return {
        "machine": machine(device),
        "compiled": COMPILED[options.compile],
        "settings": {name: value for name, value in vars(options).items() if name not in ("folder", "again")},
        "model": asdict(limits.model),
        "peak": limits.peak_rate,
    }


def about_the_measurement(header: dict[str, Any]) -> str:
    """Model, device and compilation in two lines."""
    model, about = Model(**header["model"]), header["machine"]
    name = "FLUX.1-dev's architecture" if header["settings"]["model"] == "FLUX" else "a small FLUX"
    threads = f", threads: {about['threads_per_rank']}" if header["settings"]["device"] == "cpu" else ""
    what = f"{name} of {model.layers} blocks and {model.channels} channels, random weights"
    return f"{what}, {about['device']}{threads}\n{header['compiled']}"


def console_of(width: int) -> Console:
    """A console as wide as the terminal, but no narrower than `width`."""
    console = Console()
    console.width = max(width, console.width)
    return console


def save(
    folder: Path, name: str, header: dict[str, Any], cells: Iterable[Cell], columns: Callable[[Cell], dict[str, Any]]
) -> None:
    """Write all raw results as JSON, and one line for each cell as CSV; `columns`: the table's own of a cell."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [(cell, cell.row(header["peak"]) | columns(cell)) for cell in cells]
    results = [asdict(cell) | row for cell, row in rows]
    write({**header, "load_average_at_end": os.getloadavg(), "cells": results}, folder / f"{name}.json")
    with (folder / f"{name}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0][1], lineterminator="\n")
        writer.writeheader()
        writer.writerows(row for _, row in rows)


def load(folder: Path, name: str) -> tuple[dict[str, Any], list[Cell]]:
    """Header and cells that `save` wrote, today or with other columns."""
    header = json.loads((folder / f"{name}.json").read_text())
    known = {place.name for place in fields(Cell)}
    return header, [Cell(**{key: cell[key] for key in known & cell.keys()}) for cell in header.pop("cells")]
