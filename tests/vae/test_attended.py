"""Attention by two products a block against PyTorch's, whole and in float64; the kernels in Triton's interpreter too.

The interpreter must be switched on before Triton is imported: the tests that it can run go through a second process.
"""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from clear_dist.vae import attended
from tests.compiled_kernels import MEMORY, AbsentGpu, CompiledOnly, spilled

BLOCKS = (512, 256)
"""Queries and keys of the least block."""
SIZES = [(700, 1100, 16, 1), (1300, 600, 64, 4), (520, 1500, 48, 12), (512, 256, 512, 1)]
"""Queries, keys, channels, and the scores' standard deviation: blocks in whole and ragged, one key above all others."""


def drawn(queries: int, keys: int, channels: int, deviation: float, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(queries)
    scaled = ((queries, deviation), (keys, 1.0), (keys, 1.0))
    # Rows do not lie next to each other, as those of one head among several.
    wide = (torch.randn(rows, channels + 8, generator=generator) * factor for rows, factor in scaled)
    return [x.to(dtype)[:, :channels] for x in wide]


def in_blocks(query: Tensor, key: Tensor, value: Tensor, max_bytes: int = 1) -> Tensor:
    buffers = attended.Buffers.like(query, max_bytes)
    for buffer in vars(buffers).values():
        buffer.fill_(torch.nan)
    out = torch.full_like(query, torch.nan)
    attended.attend(query, key, value, out, buffers)
    return out


def error(out: Tensor, exact: Tensor) -> float:
    return ((out.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_blocks_are_as_exact_as_pytorchs_attention(size: Any, dtype: torch.dtype) -> None:
    tensors = drawn(*size, dtype)
    stock, exact = (
        F.scaled_dot_product_attention(*(x[None, None] for x in given))[0, 0]
        for given in (tensors, [x.double() for x in tensors])
    )
    assert error(in_blocks(*tensors), exact) < 1.1 * error(stock, exact) + 1e-7


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_scores_far_beyond_what_exp_can_hold(dtype: torch.dtype) -> None:
    """The highest score comes in the last block, 100,000 above all before it; the others add nothing."""
    query, key, value = drawn(300, 700, 16, 1, dtype)
    query[:], key[-1] = 1.0, 25_000.0
    torch.testing.assert_close(in_blocks(query, key, value), value[-1].expand(300, 16))


def test_nothing_depends_on_the_size_of_blocks() -> None:
    tensors = drawn(1100, 1300, 32, 3, torch.float32)
    one, many = in_blocks(*tensors, max_bytes=1 << 24), in_blocks(*tensors)
    assert error(many, one.double()) < 1e-6


def test_buffers_hold_what_they_are_allowed_whatever_the_picture() -> None:
    for channels, max_bytes in ((512, 1 << 28), (64, 1 << 25)):
        query = torch.empty(3, channels, dtype=torch.bfloat16, device="meta")
        buffers = attended.Buffers.like(query, max_bytes)
        assert max_bytes / 8 < sum(x.nbytes for x in vars(buffers).values()) < max_bytes / 2
    assert tuple(attended.Buffers.like(query, 1).weights.shape) == BLOCKS


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is made for Linux only")
def test_results_in_the_interpreter() -> None:
    wanted = "(exact or beyond) and not float32"
    command = [sys.executable, "-m", "pytest", "-n0", "-pno:cacheprovider", "--noconftest", __file__, "-k", wanted]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    root = Path(__file__).parents[2]
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is made for Linux only")
@pytest.mark.parametrize("capability", MEMORY)
def test_kernels_fit_every_gpu_and_the_vaes_head_hardly_spills(
    capability: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from triton.runtime import driver

    from clear_dist.vae import attended_triton

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(driver, "_active", AbsentGpu(int(capability)))
    monkeypatch.setattr(attended, "shared_memory", lambda _: MEMORY[capability] * 1024)
    kernels = []
    for name in ("weigh_kernel", "add_kernel"):
        kernels.append(CompiledOnly(getattr(attended_triton, name)))
        monkeypatch.setattr(attended_triton, name, kernels[-1])
    query, key = (torch.empty(rows, 512, dtype=torch.bfloat16) for rows in BLOCKS)
    attended._add_by_kernels(query, key, key, attended.Buffers.like(query, 1), 0)
    product = {"90": "wgmma.mma_async", "100": "tcgen05.mma"}.get(capability, "mma.sync")
    for kernel in kernels:
        assert kernel.compiled.metadata.shared <= MEMORY[capability] * 1024
        assert product in kernel.compiled.asm["ptx"]
        assert "cp.async.cg" in kernel.compiled.asm["ptx"]
        assert spilled(kernel.compiled) <= (0 if capability == "90" else 192)
