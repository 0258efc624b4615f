"""The Triton kernel without a GPU: its results in Triton's interpreter, and that it compiles.

The interpreter must be switched on before Triton is imported, so the tests that need it run in a process of their own.
"""

import json
import os
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from clear_dist.attention import triton_window
from clear_dist.attention.backend import WindowCall
from tests.attention.calls import Case
from tests.compiled_kernels import MEMORY, AbsentGpu, CompiledOnly, spilled

FOLDER = Path(__file__).parent

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is made for Linux only")


def test_results_in_the_interpreter() -> None:
    tests = [str(FOLDER / file) for file in ("test_backends.py", "interpreted_triton.py")]
    command = [sys.executable, "-m", "pytest", "-n0", "-pno:cacheprovider", "--noconftest", *tests, "-k", "triton"]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, cwd=FOLDER.parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CompiledOnly:
    from clear_dist.attention import triton_kernel

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel = CompiledOnly(triton_kernel.window_kernel)
    monkeypatch.setattr(triton_kernel, "window_kernel", kernel)
    return kernel


def call_for(case: Case) -> WindowCall:
    tensors = dict(zip(("query", "key", "value", "key_text", "value_text"), case.tensors(), strict=True))
    return WindowCall(**tensors, radius=case.radius, row_offset=case.row_offset, scale=0.1)


@pytest.mark.parametrize(("asked", "known"), [(0, "80"), (80, "80"), (87, "86"), (103, "100"), (121, "120")])
def test_an_unknown_gpu_has_the_tiles_of_the_newest_one_before_it(asked: int, known: str) -> None:
    rows = json.loads(triton_window.TILINGS.read_text())["tilings"][known]
    for head_dim, dtype, most in (
        (16, torch.bfloat16, "128"),
        (128, torch.float16, "256"),
        (128, torch.float32, "1024"),
    ):
        tiling = triton_window.choose_tiling(head_dim, dtype, asked)
        found = list(tiling.queries), list(tiling.keys), tiling.warps, tiling.stages
        assert found == tuple(rows[most][name] for name in ("queries", "keys", "warps", "stages"))


LAYER = Case(rows=16, key_rows=16, columns=32, text=80, radius=16, head_dim=128, dtype=torch.bfloat16)


def compiled(kernel: CompiledOnly, capability: str, case: Case, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The kernel for a GPU that is not there, whose shared memory it does not exceed."""
    from triton.runtime import driver

    monkeypatch.setattr(driver, "_active", AbsentGpu(int(capability)))
    monkeypatch.setattr(triton_window, "architecture", lambda _: int(capability))
    call = call_for(case)
    triton_window.run(call)
    made = kernel.compiled
    lse = call.query.new_empty(call.query.shape[:-1], dtype=torch.float32)
    triton_window.extend(replace(call, out=call.query.clone()), lse)
    assert max(made.metadata.shared, kernel.compiled.metadata.shared) <= MEMORY[capability] * 1024
    assert spilled(kernel.compiled) <= spilled(made) + 64
    return made


@pytest.mark.parametrize("capability", MEMORY)
def test_a_layer_fits_every_gpu_without_spills_and_its_loads_run_ahead(
    kernel: CompiledOnly, capability: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = compiled(kernel, capability, LAYER, monkeypatch)
    assert spilled(made) <= 32
    assert "cp.async.cg" in made.asm["ptx"]
    product = {"90": "wgmma.mma_async", "100": "tcgen05.mma"}.get(capability, "mma.sync")
    assert product in made.asm["ptx"]


@pytest.mark.parametrize(
    ("case", "most_spilled"),
    [
        (replace(LAYER, text=0, key_rows=15, row_offset=-1, dtype=torch.float16, head_dim=64), 16),
        (replace(LAYER, text=1, rows=1, key_rows=1, columns=1, radius=1, heads=1, head_dim=16), 0),
        (replace(LAYER, dtype=torch.float32, head_dim=64), 64),
        (replace(LAYER, dtype=torch.float32), 256),
        (replace(LAYER, dtype=torch.float32, head_dim=256), 1536),
    ],
    ids=["halo", "one token", "float32", "wide float32", "widest float32"],
)
def test_any_call_fits_the_gpus_with_the_least_memory(
    kernel: CompiledOnly, case: Case, most_spilled: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = compiled(kernel, "86", case, monkeypatch)
    assert spilled(made) <= most_spilled
