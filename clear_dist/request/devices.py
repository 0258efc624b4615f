"""GPUs and compilers of this machine, found without torch."""

import ctypes
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from clear_dist.launch.env import Place
from clear_dist.options import Refusal

DRIVER = "libcuda.so.1"
DESCRIBE = Path(__file__).with_name("describe_gpus.py")


def count_gpus() -> int:
    return len(find_gpus())


def gpus_for(device: str) -> int:
    """Number of GPUs for ranks on `device`; raises a Refusal where `cuda` was asked for and there is none."""
    gpus = count_gpus() if device != "cpu" else 0
    if device == "cuda" and not gpus:
        raise Refusal("--device cuda needs a CUDA GPU, and there is none here; nearest: cpu")
    return gpus


def world_size(nproc: int | None, place: Place, *, otherwise: int) -> int:
    """Number of ranks, by default `otherwise`; raises a Refusal where torchrun started more or fewer than asked."""
    if place.launcher is None:
        return nproc or otherwise
    if nproc not in (None, place.world_size):
        raise Refusal(f"--nproc must be what torchrun started, or left out, got {nproc}; nearest: {place.world_size}")
    return place.world_size


@dataclass(frozen=True, kw_only=True)
class FoundGpu:
    """A CUDA device, memory in bytes; `free` is `total` where NVIDIA's management library does not tell."""

    name: str
    total: int
    free: int


def find_gpus() -> tuple[FoundGpu, ...]:
    """CUDA devices for this process, in CUDA's order; none where the driver does not tell."""
    try:
        ctypes.CDLL(DRIVER)
        answer = subprocess.run([sys.executable, "-S", str(DESCRIBE)], capture_output=True, text=True, timeout=60)
        lines = [line.split("|") for line in answer.stdout.splitlines()]
        return tuple(FoundGpu(name=name, total=int(total), free=int(free)) for name, total, free in lines)
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return ()


def missing_compiler(device_type: str) -> str | None:
    """Compiler that torch.compile lacks for a device; None: nothing."""
    if device_type == "cuda":
        return None if find_spec("triton") else "the package triton"
    compiler = os.environ.get("CXX", "g++")
    return None if shutil.which(compiler) else f"a C++ compiler ({compiler})"
