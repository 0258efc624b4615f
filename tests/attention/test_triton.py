"""The Triton kernel without a GPU: its results in Triton's interpreter, and that it compiles.

The interpreter must be switched on before Triton is imported, so the tests that need it run in a process of their own.
"""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from clear_dist.attention.triton_window import TILINGS, choose_tiling
from clear_dist.geometry import reached_tiles

FOLDER = Path(__file__).parent
SHARED_MEMORY = 227 * 1024
"""Bytes that one program may take on sm_90."""

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is made for Linux only")


@pytest.mark.timeout(300)
@pytest.mark.parametrize("tests", ["test_backends.py", "interpreted_triton.py"])
def test_results_in_the_interpreter(tests: str) -> None:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(FOLDER / tests), "-k", "triton"]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, cwd=FOLDER.parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def signature() -> dict[str, Any]:
    """Types of the kernel's arguments, as for contiguous bfloat16 tensors."""
    pointers = dict.fromkeys(("query", "key", "value", "key_text", "value_text", "out"), "*bf16")
    image, text, numbers = ("i32",) * 4 + ("constexpr",), ("i32",) * 3 + ("constexpr",), ("i32", "i32")
    strides = {f"{name}_strides": image for name in ("query", "key", "value", "out")}
    strides |= {f"{name}_strides": text for name in ("key_text", "value_text", "lse")}
    scalars = dict.fromkeys(("heads", "text", "row_offset", "radius"), "i32")
    constants = dict.fromkeys(("QUERIES", "KEYS", "FIRST", "ROWS", "HEAD_DIM"), "constexpr")
    pointers |= {"lse": "*fp32", "tiles": "*i32"}
    return {**pointers, **strides, **scalars, "queries": numbers, "keys": numbers, "log2_scale": "fp32", **constants}


@pytest.mark.parametrize("capability", [80, 90])
def test_it_compiles_and_loads_run_ahead(capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads of 128 in bfloat16, for a GPU that need not be there."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from clear_dist.attention.triton_kernel import window_kernel

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    tiling = choose_tiling(256)
    assert tiling in TILINGS.values()
    reached = reached_tiles(16, tiling.queries, tiling.keys)
    types = signature()
    names = window_kernel.arg_names
    known = {"QUERIES": tiling.queries, "KEYS": tiling.keys, "FIRST": min(reached), "ROWS": len(reached)}
    constants = {(names.index(name),): value for name, value in (known | {"HEAD_DIM": 128}).items()}
    strides = [name for name in names if name.endswith("_strides")]
    constants |= {(names.index(name), len(types[name]) - 1): 1 for name in strides}
    aligned = [(index,) for index, name in enumerate(names) if str(types[name]).startswith("*")]
    aligned += [(names.index(name), i) for name in strides[:-1] for i in range(len(types[name]) - 1)]
    source = ASTSource(
        window_kernel,
        {name: types[name] for name in names},
        constants,
        {argument: [["tt.divisibility", 16]] for argument in aligned},
    )
    options = {"num_warps": tiling.warps, "num_stages": tiling.stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert compiled.metadata.shared <= SHARED_MEMORY
    assert "cp.async" in compiled.asm["ptx"]
    assert ("wgmma.mma_async" if capability == 90 else "mma.sync") in compiled.asm["ptx"]
