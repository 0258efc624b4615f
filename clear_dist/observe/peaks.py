"""Peak memory of this process, on its device and on the host."""

import ctypes
import resource
from pathlib import Path

import torch

_CLEAR_HIGH_WATER_MARK = "5"


def give_back(device: torch.device) -> None:
    """Return memory that is not in use to the system: glibc keeps hundreds of MB a rank, torch all of a GPU's."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if device.type == "cpu" else None
    if trim is not None:
        trim(0)


def reset_peak_memory(device: torch.device) -> bool:
    """Start measuring anew; False where the system does not allow it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        Path("/proc/self/clear_refs").write_text(_CLEAR_HIGH_WATER_MARK)
    except OSError:
        return False
    return True


def peak_memory(device: torch.device) -> int:
    """Most bytes since the reset: allocated by torch on CUDA, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def host_memory() -> int | None:
    """This process's proportional set size in bytes; None where the system does not tell."""
    try:
        rollup = Path("/proc/self/smaps_rollup").read_text()
    except OSError:
        return None
    return 1024 * int(rollup.split("Pss:")[1].split()[0])
