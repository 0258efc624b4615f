"""Command lines of the benchmarks: help is the module's docstring, and a wrong flag is answered in one line."""

import argparse
import sys
from pathlib import Path
from typing import NoReturn

from benchmarks.lib.counts import TOKEN


class Parser(argparse.ArgumentParser):
    """A parser named as its script is run, for instance `python -m benchmarks.speed.attention`."""

    def __init__(self, description: str | None) -> None:
        name = f"python -m {module_of(sys.argv[0])}"
        super().__init__(name, description=description, formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def module_of(file: str) -> str:
    """The script's module: benchmarks, its folder and its name."""
    return ".".join(Path(file).with_suffix("").parts[-3:])


def pixels(text: str) -> int:
    """The side of an image, a multiple of `TOKEN`; an argparse type."""
    side = whole_number(text)
    if side % TOKEN:
        nearest = max(TOKEN, TOKEN * round(side / TOKEN))
        raise argparse.ArgumentTypeError(f"must be a multiple of {TOKEN}, got {side}; nearest: {nearest}")
    return side


def whole_number(text: str) -> int:
    """An integer of at least 1; an argparse type."""
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}; nearest: 1")
    return int(text)


def positive(text: str) -> float:
    """A finite number above 0; an argparse type."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number above 0, got {text!r}")
    return number
