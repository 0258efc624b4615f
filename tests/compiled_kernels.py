"""Triton kernels compiled for GPUs that are not there."""

import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

MEMORY = {"80": 163, "86": 99, "89": 99, "90": 227, "100": 227, "120": 99}
"""KiB of shared memory that one program may take, by compute capability (CUDA C++ Programming Guide)."""


class AbsentGpu:
    """What Triton asks a driver before it launches a kernel."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability  # Triton keeps what it compiled by this number

    def get_current_stream(self, device: int) -> int:
        return 0


class CompiledOnly:
    """Stands in for a kernel: compiles it for the arguments it is called with, and keeps what came out."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, int]) -> Callable[..., None]:
        def launch(*arguments: Any, **options: Any) -> None:
            self.compiled = self.kernel.warmup(*arguments, grid=grid, **options)

        return launch


def spilled(kernel: Any) -> int:
    """Bytes of each thread that lie in memory for want of registers."""
    from triton import knobs

    with NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(kernel.asm["cubin"])
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return sum(int(size) for size in re.findall(r"(?:STACK|LOCAL):(\d+)", told))
