"""What a process has freed goes back to the system."""

import ctypes

import torch


def give_back(device: torch.device) -> None:
    """Give memory back that lies between blocks in use, where the C library keeps it (glibc; hundreds of MB a rank)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if device.type == "cpu" else None
    if trim is not None:
        trim(0)
