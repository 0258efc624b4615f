"""A program that prints name, compute capability, total and free bytes of each CUDA device, a line each.

Standard library only; a process of its own, as one that has initialised CUDA cannot fork ranks. It makes no context,
which would take half a gigabyte. The driver knows the devices of CUDA_VISIBLE_DEVICES, NVIDIA's management library
their free memory, by UUID.
"""

import ctypes
import sys
import uuid
from collections.abc import Iterator
from typing import Any

KINDS = ("GPU", "MIG")
MAJOR, MINOR = 75, 76
"""Attributes of a device (cuda.h)."""


def describe(driver: Any, library: Any | None) -> Iterator[str]:
    """The lines, from libcuda and libnvidia-ml (initialised); without the latter all of a device counts as free."""
    count, reason = ctypes.c_int(), ctypes.c_char_p()
    if error := driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        driver.cuGetErrorName(error, ctypes.byref(reason))
        print((reason.value or b"an error").decode(), file=sys.stderr)
        return
    for number in range(count.value):
        device, total, name = ctypes.c_int(), ctypes.c_size_t(), ctypes.create_string_buffer(128)
        driver.cuDeviceGet(ctypes.byref(device), number)
        driver.cuDeviceGetName(name, len(name), device)
        driver.cuDeviceTotalMem_v2(ctypes.byref(total), device)
        free = _free_bytes(driver, library, device)
        least = total.value if free is None else min(free, total.value)
        yield f"{name.value.decode()}|{_capability(driver, device)}|{total.value}|{least}"


def _capability(driver: Any, device: ctypes.c_int) -> str:
    major, minor = ctypes.c_int(), ctypes.c_int()
    driver.cuDeviceGetAttribute(ctypes.byref(major), MAJOR, device)
    driver.cuDeviceGetAttribute(ctypes.byref(minor), MINOR, device)
    return f"{major.value}.{minor.value}"


def _free_bytes(driver: Any, library: Any | None, device: ctypes.c_int) -> int | None:
    known = (ctypes.c_ubyte * 16)()
    if library is None or driver.cuDeviceGetUuid_v2(known, device):
        return None
    handle, memory = ctypes.c_void_p(), (ctypes.c_ulonglong * 3)()  # total, free, used
    for kind in KINDS:
        word = f"{kind}-{uuid.UUID(bytes=bytes(known))}".encode()
        if not library.nvmlDeviceGetHandleByUUID(word, ctypes.byref(handle)):
            return None if library.nvmlDeviceGetMemoryInfo(handle, memory) else memory[1]
    return None


def _management_library() -> Any | None:
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    return None if library.nvmlInit_v2() else library


if __name__ == "__main__":
    for line in describe(ctypes.CDLL("libcuda.so.1"), _management_library()):
        print(line)
