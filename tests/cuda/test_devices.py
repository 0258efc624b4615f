"""Every generation of GPUs from Turing to Blackwell: what is chosen for it, compiled and launched.

The command line draws with the embedded model, whose heads are small; windows with heads of 128, as FLUX has them, are
computed apart.
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from clear_dist.attention import choose_backend, window_attention
from tests.cuda.null_gpu import Ended, Machine, NullGpus

TURING, CAPABILITIES = 75, (80, 86, 89, 90, 100, 120)
GENERATE = "generate", "--model", "demo", "--device", "cuda", "--steps", "2", "--output", "drawn.png"
MOST_SPILLED = 1024
"""Bytes of a thread, in float32; in 16 bits some words at most (tests/attention/test_triton.py)."""


def draw(null_gpus: NullGpus, folder: Path, capability: int, backend: str, dtype: str = "auto") -> Ended:
    flags = "--attention-backend", backend, "--dtype", dtype
    return null_gpus.command(*GENERATE, *flags, machine=Machine(gpus=1, capability=capability), folder=folder)


@pytest.mark.parametrize("backend", ["auto", "triton"])
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_pictures_are_drawn(capability: int, backend: str, null_gpus: NullGpus, tmp_path: Path) -> None:
    ended = draw(null_gpus, tmp_path, capability, backend)
    assert ended.status == 0, ended.err
    assert "dtype: " not in ended.err


@pytest.mark.full
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("backend", ["auto", "tiled", "masked", "flex", "triton"])
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_backend_draws_in_every_dtype(
    capability: int, backend: str, dtype: str, null_gpus: NullGpus, tmp_path: Path
) -> None:
    ended = draw(null_gpus, tmp_path, capability, backend, dtype)
    assert ended.status == 0, ended.err


@pytest.mark.parametrize(("backend", "dtype"), [("auto", "auto"), ("tiled", "float16"), ("masked", "float32")])
def test_before_ampere_pictures_are_drawn(backend: str, dtype: str, null_gpus: NullGpus, tmp_path: Path) -> None:
    ended = draw(null_gpus, tmp_path, TURING, backend, dtype)
    assert ended.status == 0, ended.err
    told = "dtype: float16 (GPUs of compute capability below 8.0 lack bfloat16)"
    assert (told in ended.err) == (dtype == "auto")


@pytest.mark.parametrize(
    ("backend", "dtype", "reason"),
    [
        ("triton", "auto", "attention backend triton cannot run: it needs a GPU with 99 KiB of shared memory"),
        ("flex", "float32", "attention backend flex cannot run: its compiler, Triton, needs a GPU of compute"),
        ("auto", "bfloat16", "--dtype bfloat16 needs GPUs of compute capability 8.0 or higher, got 7.5"),
    ],
)
def test_before_ampere_the_rest_is_refused(
    backend: str, dtype: str, reason: str, null_gpus: NullGpus, tmp_path: Path
) -> None:
    ended = draw(null_gpus, tmp_path, TURING, backend, dtype)
    assert ended.status == 2
    assert ended.last_line.startswith(f"clear-dist: {reason}"), ended.err


@pytest.mark.parametrize("backend", ["flex", "triton"])
@pytest.mark.parametrize(
    "capability", [pytest.param(each, marks=() if each == 86 else pytest.mark.full) for each in CAPABILITIES]
)
def test_kernels_for_wide_heads_fit_the_gpu(capability: int, backend: str, null_gpus: NullGpus, tmp_path: Path) -> None:
    from triton import knobs

    caches = {name: str(tmp_path / name) for name in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")}
    machine = Machine(gpus=1, capability=capability)
    ended = null_gpus.run("-m", __name__, backend, machine=machine, folder=tmp_path, variables=caches)
    assert ended.status == 0, ended.err
    kernels = [*Path(caches["TRITON_CACHE_DIR"]).rglob("*.cubin")]
    assert kernels
    for kernel in kernels:
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", str(kernel)]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert sum(int(size) for size in re.findall(r"(?:STACK|LOCAL):(\d+)", told)) <= MOST_SPILLED, told


def windows_of_flux(name: str) -> None:
    """A window of a layer of FLUX on this process's GPU, in 16 bits and in float32."""
    for dtype in (torch.bfloat16, torch.float32):
        image = torch.empty(1, 16, 32, 24, 128, dtype=dtype, device="cuda")
        text = torch.empty(1, 512, 24, 128, dtype=dtype, device="cuda")
        backend = choose_backend(name, device="cuda", dtype=dtype, head_dim=128)
        with torch.inference_mode():
            window_attention(image, image, image, text, text, radius=8, row_offset=0, backend=backend)


if __name__ == "__main__":
    windows_of_flux(sys.argv[1])
