"""The Triton kernel without a GPU: its results in Triton's interpreter, and that it compiles.

The interpreter must be switched on before Triton is imported, so the tests that need it run in a process of their own.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from clear_dist.attention import triton_window
from clear_dist.attention.backend import WindowCall
from tests.attention.calls import Case

FOLDER = Path(__file__).parent
SHARED_MEMORY = 227 * 1024
"""Bytes that one program may take on sm_90."""

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is made for Linux only")


def test_results_in_the_interpreter() -> None:
    tests = [str(FOLDER / file) for file in ("test_backends.py", "interpreted_triton.py")]
    command = [sys.executable, "-m", "pytest", "-n0", "-pno:cacheprovider", "--noconftest", *tests, "-k", "triton"]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, cwd=FOLDER.parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


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


@pytest.fixture
def compiled_only(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CompiledOnly:
    """The kernel, on a GPU of the capability `request.param` that is not there."""
    from triton.runtime import driver

    from clear_dist.attention import triton_kernel

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel = CompiledOnly(triton_kernel.window_kernel)
    monkeypatch.setattr(triton_kernel, "window_kernel", kernel)
    monkeypatch.setattr(driver, "_active", AbsentGpu(request.param))
    return kernel


def call_for(case: Case) -> WindowCall:
    tensors = dict(zip(("query", "key", "value", "key_text", "value_text"), case.tensors(), strict=True))
    return WindowCall(**tensors, radius=case.radius, row_offset=case.row_offset, scale=0.1)


LAYER = Case(rows=16, key_rows=16, columns=32, text=80, radius=16, head_dim=128, dtype=torch.bfloat16)


@pytest.mark.parametrize("compiled_only", [80, 90], indirect=True, ids=["sm_80", "sm_90"])
def test_it_compiles_and_loads_run_ahead(compiled_only: CompiledOnly, request: pytest.FixtureRequest) -> None:
    triton_window.run(call_for(LAYER))
    assert compiled_only.compiled.metadata.shared <= SHARED_MEMORY
    code = compiled_only.compiled.asm["ptx"]
    assert "cp.async.cg" in code
    assert ("wgmma.mma_async" if "sm_90" in request.node.name else "mma.sync") in code


@pytest.mark.parametrize("compiled_only", [90], indirect=True, ids=["sm_90"])
@pytest.mark.parametrize(
    "case",
    [
        replace(LAYER, text=0, key_rows=15, row_offset=-1, dtype=torch.float16, head_dim=64),
        replace(LAYER, text=1, rows=1, key_rows=1, columns=1, radius=1, heads=1, head_dim=16),
        replace(LAYER, dtype=torch.float32, head_dim=64),
    ],
    ids=["halo", "one token", "float32"],
)
def test_it_compiles_for_any_call(compiled_only: CompiledOnly, case: Case) -> None:
    triton_window.run(call_for(case))
    assert compiled_only.compiled.metadata.shared <= SHARED_MEMORY
