"""GPUs, counted without torch."""

import ctypes
import subprocess
import sys

DRIVER = "libcuda.so.1"
# In a process of its own: once a process has initialised CUDA, ranks forked from it cannot use it.
_COUNT = f"""
import ctypes
driver, count = ctypes.CDLL({DRIVER!r}), ctypes.c_int()
print(count.value if not driver.cuInit(0) and not driver.cuDeviceGetCount(ctypes.byref(count)) else 0)
"""


def count_gpus() -> int:
    """CUDA devices that this process may use (the driver heeds CUDA_VISIBLE_DEVICES)."""
    try:
        ctypes.CDLL(DRIVER)
        answer = subprocess.run([sys.executable, "-S", "-c", _COUNT], capture_output=True, text=True, timeout=60)
        return int(answer.stdout)
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return 0
