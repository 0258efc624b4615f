"""The kernels that merge, without a GPU: their results in Triton's interpreter, and that they compile."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from clear_dist.kernels import merging
from tests.compiled_kernels import AbsentGpu, CompiledOnly

FOLDER = Path(__file__).parent
KERNELS = (
    "merge_kernel",
    "merge_stacked_kernel",
    "weigh_kernel",
    "unweigh_kernel",
    "relay_kernel",
    "pack_kernel",
    "spread_kernel",
)

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is made for Linux only")


def test_results_in_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-n0", "-pno:cacheprovider", "--noconftest"]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(FOLDER / "interpreted_merging.py")],
        env=environment,
        cwd=FOLDER.parents[1],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout


def call_all() -> None:
    """Shapes of FLUX on a rank of 8 at 1024 px; nothing is computed."""
    out, lse = torch.empty(1, 8, 64, 24, 128, dtype=torch.bfloat16), torch.empty(1, 8, 64, 24)
    merging.merge([(out, lse, 0), (out[:, :7], lse[:, :7], 0), (out[:, 1:], lse[:, 1:], 1)], out)
    merging.merge([(out[:, 0], lse[:, 0], 0)] * 2, out[:, 0], lse[:, 0])
    text, text_lse = torch.empty(1, 512, 24, 128, dtype=torch.bfloat16), torch.empty(1, 24, 512).transpose(1, 2)
    terms = torch.empty(1, 512, 24, 129)
    merging.weigh(text, text_lse, text_lse, terms)
    merging.unweigh(terms, text)
    merging.relay(terms, torch.empty(1, 512, 24), text, text_lse, text, 60.0)
    tokens = [torch.empty(1, 1024, 24, 128, dtype=torch.bfloat16) for _ in range(3)]
    merging.spread(torch.empty(8, 64, 3, 1, 24, 128, dtype=torch.bfloat16), (64,) * 8, 3, tokens)
    for behind in (0, 2):
        packed = torch.empty(512, 1, 24, 128 + behind, dtype=torch.bfloat16).transpose(0, 1)
        bits = packed.view(torch.float32)[..., 64] if behind else None
        merging.pack(text, text_lse if behind else None, packed[..., :128], bits, first=448, to=64)
        parts = packed.transpose(0, 1).unflatten(0, (8, 64)).transpose(1, 2)
        lses = parts.view(torch.float32)[..., 64] if behind else None
        merging.merge_stacked(parts[..., :128], lses, text[:, :64])


@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_compile_and_leave_nothing_in_memory(
    capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from triton.runtime import driver

    from clear_dist.kernels import merging_kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(driver, "_active", AbsentGpu(capability))
    kernels = {name: CompiledOnly(getattr(merging_kernels, name)) for name in KERNELS}
    for name, kernel in kernels.items():
        monkeypatch.setattr(merging_kernels, name, kernel)
    call_all()
    for name, kernel in kernels.items():
        assert "st.local" not in kernel.compiled.asm["ptx"], name
