"""Versions and devices of the ranks, and whether they are the same."""

import os
import platform
import shutil
import socket
import subprocess
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from clear_dist.comm.group import Group
from clear_dist.observe.report import versions
from clear_dist.verify.finding import Finding, Subjects

OPTIONAL = ("huggingface_hub", "triton")
SECONDS_FOR_A_TOOL = 5.0


def compare_environments(group: Group, _: Subjects) -> Iterator[Finding]:
    """Versions must be the same on all ranks; devices may differ."""
    mine = facts(group)
    everyone = group.gather_objects(mine | {"host": socket.gethostname()})
    hosts = list(dict.fromkeys(rank["host"] for rank in everyone))
    mine["host"] = hosts.index(socket.gethostname())  # a number: a bug report needs no names
    others = differences(everyone, group.rank)
    devices = dict.fromkeys(rank["device"] for rank in everyone)
    driver = f", driver {mine['versions']['driver']}" if "driver" in mine["versions"] else ""
    yield Finding(
        name="environment",
        error=len(others),
        figure=f"{_counted(group.size, 'rank')} on {_counted(len(hosts), 'host')}, {' and '.join(devices)}, "
        f"{group.transport}, torch {mine['versions']['torch']}{driver}",
        fault="; ".join(others),
        details=mine,
    )


def facts(group: Group) -> dict[str, Any]:
    """Versions, device, driver and threads of this rank, as plain values; links between GPUs on rank 0."""
    cuda = group.device.type == "cuda"
    return {
        "versions": versions() | _optional_versions() | (_cuda_versions(group.transport) if cuda else {}),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "device": torch.cuda.get_device_name(group.device) if cuda else _cpu_name(),
        "gpu": _gpu(group.device) if cuda else None,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "transport": group.transport,
        "links": _tool("nvidia-smi", "topo", "-m").splitlines() if cuda and group.rank == 0 else [],
    }


def differences(everyone: Sequence[dict[str, Any]], rank: int) -> list[str]:
    mine, first = everyone[rank]["versions"], everyone[0]["versions"]
    return [
        f"{name} {mine.get(name, 'missing')} here, {first.get(name, 'missing')} on rank 0"
        for name in sorted(first.keys() | mine.keys())
        if mine.get(name) != first.get(name)
    ]


def _optional_versions() -> dict[str, str]:
    found = {}
    for name in OPTIONAL:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _cuda_versions(transport: str) -> dict[str, str]:
    driver = _tool("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").splitlines()
    nccl = {"nccl": ".".join(map(str, torch.cuda.nccl.version()))} if transport == "nccl" else {}
    return {"cuda": str(torch.version.cuda), "driver": driver[0] if driver else "unknown"} | nccl


def _gpu(device: torch.device) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(device)
    return {
        "index": device.index,
        "memory_bytes": properties.total_memory,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "reaches": [
            other
            for other in range(torch.cuda.device_count())
            if other != device.index and torch.cuda.can_device_access_peer(device.index, other)
        ],
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.machine())


def _tool(*command: str) -> str:
    if shutil.which(command[0]) is None:
        return ""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=SECONDS_FOR_A_TOOL).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"
