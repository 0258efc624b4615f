"""GPUs and compilers of this machine, found without torch."""

import ctypes
import os
import runpy
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from clear_dist.launch.env import Place
from clear_dist.options import Refusal, shortened

DRIVER, NO_DEVICE = "libcuda.so.1", "CUDA_ERROR_NO_DEVICE"
DESCRIBE = Path(__file__).with_name("describe_gpus.py")


def gpus_for(device: str) -> tuple["FoundGpu", ...]:
    """GPUs for ranks on `device`; raises a Refusal where `cuda` finds none, or torch cannot use those that are here."""
    gpus = find_gpus() if device != "cpu" else ()
    if device == "cuda" and not gpus:
        raise Refusal(f"--device cuda needs a GPU that CUDA sees, {_why_none()}, or --device cpu")
    if gpus and (reason := why_torch_sees_none()):
        raise Refusal(f"torch must see the GPUs of this machine ({len(gpus)}), {reason}, or --device cpu")
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
    capability: float
    """Compute capability."""
    total: int
    free: int


def find_gpus() -> tuple[FoundGpu, ...]:
    """CUDA devices for this process, in CUDA's order; none where the driver does not tell."""
    try:
        return tuple(
            FoundGpu(name=name, capability=float(capability), total=int(total), free=int(free))
            for name, capability, total, free in (line.split("|") for line in _description().stdout.splitlines())
        )
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return ()


def _description() -> "subprocess.CompletedProcess[str]":
    """What the driver says of its devices; raises OSError where there is no driver."""
    ctypes.CDLL(DRIVER)
    return subprocess.run([sys.executable, "-S", str(DESCRIBE)], capture_output=True, text=True, timeout=60)


def _why_none() -> str:
    """What the driver gives instead of GPUs, and what helps."""
    try:
        error = _description().stderr.strip().rpartition("\n")[2]
    except OSError:
        return f"got no NVIDIA driver ({DRIVER}); nearest: its installation, in a container docker run --gpus all"
    except subprocess.TimeoutExpired:
        error = "no answer"
    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    if shown is not None and error in ("", NO_DEVICE):
        return f"got none by CUDA_VISIBLE_DEVICES={shortened(shown)!r}; nearest: unset CUDA_VISIBLE_DEVICES"
    return f"got {error or 'none'} from the driver; nearest: what nvidia-smi advises"


def why_torch_sees_none() -> str | None:
    """What torch, which is not imported, lacks for GPUs that the driver sees, and what helps; None: nothing."""
    spec = find_spec("torch")
    assert spec is not None and spec.origin is not None, "a requirement"
    torch, driver = runpy.run_path(str(Path(spec.origin).with_name("version.py"))), ctypes.c_int()
    ctypes.CDLL(DRIVER).cuDriverGetVersion(ctypes.byref(driver))
    newest, built = f"{driver.value // 1000}.{driver.value % 1000 // 10}", torch["cuda"]
    build = f"torch for CUDA {newest} from the index that pytorch.org/get-started names"
    if built is None:
        return f"got torch {torch['__version__']}, which was built without CUDA; nearest: pip install {build}"
    if int(built.partition(".")[0]) > driver.value // 1000:  # within one major version any driver does
        return f"got torch for CUDA {built} and a driver for CUDA {newest}; nearest: a newer driver, {build}"
    return None


def missing_compiler(device_type: str) -> str | None:
    """Compiler that torch.compile lacks for a device; None: nothing."""
    if device_type == "cuda":
        return None if find_spec("triton") else "the package triton"
    compiler = os.environ.get("CXX", "g++")
    return None if shutil.which(compiler) else f"a C++ compiler ({compiler})"
