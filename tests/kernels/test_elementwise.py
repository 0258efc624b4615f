"""Kernels between products without a GPU: their results in Triton's interpreter, and that they compile.

The interpreter must be switched on before Triton is imported, so the tests that need it run in a process of their own.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor

from clear_dist.kernels import elementwise
from tests.compiled_kernels import MEMORY, AbsentGpu, CompiledOnly, spilled

HERE = Path(__file__).parent

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is made for Linux only")


@pytest.mark.parametrize("file", ["interpreted_elementwise.py", "interpreted_blocks.py"])
def test_results_in_the_interpreter(file: str) -> None:
    command = [sys.executable, "-m", "pytest", "-n0", "-pno:cacheprovider", "--noconftest", str(HERE / file)]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, cwd=HERE.parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def tokens(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(1, 2, *shape, dtype=dtype)


def modulate(channels: int, dtype: torch.dtype) -> None:
    shift, scale = torch.empty(1, 2 * channels, dtype=dtype).chunk(2, dim=1)
    elementwise.modulate(tokens(channels, dtype=dtype), shift, scale, 1e-6)


def add_gated(channels: int, dtype: torch.dtype) -> None:
    x, y, out = (tokens(channels, dtype=dtype) for _ in range(3))
    elementwise.add_gated(x, torch.empty(1, channels, dtype=dtype), y, out)


def add_and_modulate(channels: int, dtype: torch.dtype) -> None:
    x, y, total = (tokens(channels, dtype=dtype) for _ in range(3))
    gate, shift, scale = torch.empty(1, 3 * channels, dtype=dtype).chunk(3, dim=1)
    elementwise.add_and_modulate(x, gate, y, shift, scale, total, 1e-6)


def gelu(channels: int, dtype: torch.dtype) -> None:
    elementwise.gelu(tokens(4 * channels, dtype=dtype), tokens(5 * channels, dtype=dtype)[..., channels:])


def rotate(channels: int, dtype: torch.dtype) -> None:
    x, out, turns = *(tokens(channels // 128, 128, dtype=dtype) for _ in range(2)), torch.empty(2, 128)
    elementwise.rotate([x], [torch.empty(128, dtype=dtype)], turns, turns, [out], 1e-6)


def rotate_both(channels: int, dtype: torch.dtype) -> None:
    xs, outs = ([tokens(channels // 128, 128, dtype=dtype) for _ in range(2)] for _ in range(2))
    elementwise.rotate(xs, [torch.empty(128, dtype=dtype)] * 2, torch.empty(2, 128), torch.empty(2, 128), outs, 1e-6)


KERNELS = (modulate, add_gated, add_and_modulate, gelu, rotate, rotate_both)
WIDEST = elementwise.MOST_CHANNELS // 4
"""Channels of a token in float32; its MLP's are then the most that the kernels take."""


@pytest.mark.parametrize("capability", MEMORY)
@pytest.mark.parametrize("call", KERNELS, ids=lambda call: call.__name__)
def test_it_compiles_for_every_gpu_without_spills(
    call: Callable[[int, torch.dtype], None], capability: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For FLUX's tokens, which are read and written 16 bytes at a time; and for wider ones in float32."""
    from triton.runtime import driver

    from clear_dist.kernels import elementwise_kernel

    name = f"{call.__name__}_kernel"
    kernel = CompiledOnly(getattr(elementwise_kernel, name))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(driver, "_active", AbsentGpu(int(capability)))
    monkeypatch.setattr(elementwise_kernel, name, kernel)
    for channels, dtype, most_spilled in ((3072, torch.bfloat16, 0), (WIDEST, torch.float32, 8)):
        call(channels, dtype)
        assert spilled(kernel.compiled) <= most_spilled
        assert "ld.global.v4" in kernel.compiled.asm["ptx"] and "st.global.v4" in kernel.compiled.asm["ptx"]
