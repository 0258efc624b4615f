"""What figures were measured on, and a command line that answers wrong flags in one line."""

import argparse
import os
import platform
import shlex
import shutil
import subprocess
import sys
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import torch
from counts import TOKEN

from clear_dist.observe.report import versions, write


def machine(device: torch.device) -> dict[str, Any]:
    """Device, driver, versions, date, and the command; folders are left out of it."""
    words = [Path(word).name if os.sep in word else word for word in sys.argv]
    return {
        "device": name_of(device),
        "driver": driver_of(device),
        "cores": os.cpu_count(),
        "threads_per_rank": torch.get_num_threads(),
        "load_average": os.getloadavg(),
        "versions": versions() | {"cuda": torch.version.cuda},
        "date": datetime.now().astimezone().isoformat(timespec="minutes"),
        "command": shlex.join(["python", f"benchmarks/{words[0]}", *words[1:]]),
    }


def name_of(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.machine())


def driver_of(device: torch.device) -> str:
    if device.type != "cuda":
        return f"none ({platform.system()} {platform.release()})"
    if shutil.which("nvidia-smi") is None:
        return "unknown: there is no nvidia-smi"
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(query, check=True, capture_output=True, text=True).stdout.splitlines()[0]


def save(report: dict[str, Any], file: Path | None) -> None:
    """As JSON, in a folder that need not be there; None: nowhere."""
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        write(report, file)


class Parser(argparse.ArgumentParser):
    """Help is a module's docstring as it stands; a wrong flag is answered in one line."""

    def __init__(self, description: str | None) -> None:
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def pixels(text: str) -> int:
    """The side of an image, for argparse."""
    side = whole_number(text)
    if side % TOKEN:
        raise argparse.ArgumentTypeError(f"must be a multiple of {TOKEN}, got {side}; nearest: {nearest(side)}")
    return side


def nearest(side: int) -> int:
    return max(TOKEN, TOKEN * round(side / TOKEN))


def whole_number(text: str) -> int:
    """At least 1, for argparse."""
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}; nearest: 1")
    return int(text)


def positive(text: str) -> float:
    """For argparse."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number above 0, got {text!r}")
    return number
