"""The machine that figures were measured on, and the file of results."""

import os
import platform
import shlex
import shutil
import subprocess
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks.lib.flags import module_of
from clear_dist.observe.report import versions, write


def machine(device: torch.device) -> dict[str, Any]:
    """Device, driver, versions, date and command; folders are left out of the command."""
    words = [Path(word).name if os.sep in word else word for word in sys.argv[1:]]
    return {
        "device": name_of(device),
        "driver": driver_of(device),
        "cores": os.cpu_count(),
        "threads_per_rank": torch.get_num_threads(),
        "load_average": os.getloadavg(),
        "versions": versions() | {"cuda": torch.version.cuda},
        "date": datetime.now().astimezone().isoformat(timespec="minutes"),
        "command": shlex.join(["python", "-m", module_of(sys.argv[0]), *words]),
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
    """Write `report` as JSON and make the file's folder; None writes nothing."""
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        write(report, file)
