"""Programs on GPUs that are not there: torch's CUDA build on stubs of CUDA, cuBLAS, cuDNN, NVML and NCCL.

Memory is reserved, small copies are made, kernels compute nothing. What is right: control flow, memory, streams,
launches, shared memory, messages and their order; never a number of a picture, never a time.
"""

import ctypes
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


@dataclass(frozen=True, kw_only=True)
class Machine:
    """GPUs of one kind."""

    gpus: int = 2
    capability: int = 90
    """90 is sm_90."""
    gib: float = 79.1
    used_gib: float = 0.5
    """Memory of each, taken by others, as NVML tells."""
    unseen_gib: float = 0.0
    """Taken by others, and not told by NVML."""
    failure: str = ""
    """A failure of NCCL, by its name in stubs/nccl.c."""

    @property
    def variables(self) -> dict[str, str]:
        facts = {
            "NULLCUDA_DEVICES": self.gpus,
            "NULLCUDA_CC": self.capability,
            "NULLCUDA_GIB": self.gib,
            "NULLCUDA_USED_GIB": self.used_gib,
            "NULLCUDA_UNSEEN_GIB": self.unseen_gib,
            "NULLNCCL_FAIL": self.failure,
        }
        return {name: str(value) for name, value in facts.items()}


def build(folder: Path) -> None:
    """The stubs, by gcc, unless they are there; raises CalledProcessError."""
    if (folder / "libcuda.so").exists():  # the last to be made
        return
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    subprocess.run(["sh", HERE / "stubs" / "build.sh", folder], check=True, env=os.environ | {"PATH": path})


def environment(stubs: Path, machine: Machine) -> dict[str, str]:
    """Variables with which a program sees `machine`; kernels that are compiled are kept beside the stubs."""
    return machine.variables | {
        "LD_PRELOAD": f"{stubs}/libnullrt.so",
        "LD_LIBRARY_PATH": str(stubs),
        "TRITON_LIBCUDA_PATH": str(stubs),
        "TRITON_CACHE_DIR": f"{stubs}/triton",
        "TORCHINDUCTOR_CACHE_DIR": f"{stubs}/inductor",
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
        "TORCH_CUDNN_V8_API_DISABLED": "1",
        "PYTHONPATH": f"{HERE / 'site'}{os.pathsep}{ROOT}",
    }


@dataclass(frozen=True, kw_only=True)
class Ended:
    """A program that has ended."""

    status: int
    out: str
    err: str

    @property
    def last_line(self) -> str:
        return (self.err.splitlines() or [""])[-1]


@dataclass(frozen=True)
class NullGpus:
    """Runs programs over stub drivers."""

    stubs: Path

    def run(
        self,
        *arguments: str | Path,
        machine: Machine | None = None,
        folder: Path,
        variables: Mapping[str, str] | None = None,
    ) -> Ended:
        """Run Python with `arguments` in `folder`."""
        given = environment(self.stubs, machine or Machine()) | dict(variables or {})
        done = subprocess.run(
            [sys.executable, "-P", *arguments], cwd=folder, env=os.environ | given, capture_output=True, text=True
        )
        return Ended(status=done.returncode, out=done.stdout, err=done.stderr)

    def command(self, *arguments: str | Path, machine: Machine | None = None, folder: Path) -> Ended:
        """Run `clear-dist` with `arguments`."""
        return self.run("-m", "clear_dist", *arguments, machine=machine, folder=folder)


class Counts:
    """Counts of the stubs in this process, by name."""

    def __init__(self) -> None:
        self._stubs = ctypes.CDLL("libnullrt.so")
        self._stubs.nullcuda_count.restype = ctypes.c_long
        self._stubs.nullcuda_counters.restype = ctypes.c_char_p
        self._names = self._stubs.nullcuda_counters().decode().split()

    def since_last(self) -> dict[str, int]:
        """What has happened since the last call."""
        found = {name: self._stubs.nullcuda_count(number) for number, name in enumerate(self._names)}
        self._stubs.nullcuda_reset()
        return found
