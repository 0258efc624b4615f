"""Peak memory of this process, on its device and on the host."""

import ctypes
import resource
from pathlib import Path

import torch

_CLEAR_HIGH_WATER_MARK = "5"
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
KEPT, LARGEST_KEPT = 128 * 2**20, 32 * 2**20
"""Bytes of freed memory that glibc keeps, and of the largest tensor that it keeps the memory of, which is the most that
all its versions allow."""


def give_back(device: torch.device) -> None:
    """Return memory that is not in use to the system: glibc keeps hundreds of MB a rank, torch all of a GPU's."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if device.type == "cpu" else None
    if trim is not None:
        trim(0)


def keep_for_the_next_layer(device: torch.device) -> None:
    """Have glibc keep some of what is freed, for this whole process.

    Else it may give a layer's memory to the system, and the next layer waits while it comes back, page by page.
    """
    tune = getattr(ctypes.CDLL(None), "mallopt", None) if device.type == "cpu" else None
    if tune is not None:
        tune(_M_MMAP_THRESHOLD, LARGEST_KEPT)
        tune(_M_TRIM_THRESHOLD, KEPT)


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
