"""SD3's blocks in chunks, by our kernels and by torch."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from clear_dist.engine import parts
from clear_dist.parallelize import parallelize
from tests.families.sd3.interpreted_blocks import inputs
from tests.families.sd3.tiny import KINDS, Kind, make_tiny_pipeline

FILE = Path(__file__).with_name("interpreted_blocks.py")


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is made for Linux only")
def test_results_in_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-n0", "-pno:cacheprovider", "--noconftest", str(FILE)]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, cwd=FILE.parents[3], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("kind", KINDS)
def test_chunks_are_parts_of_the_whole(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = make_tiny_pipeline(kind)
    with torch.no_grad():
        (expected,) = pipe.transformer(**inputs(2))
        handle = parallelize(pipe, window="full")
        monkeypatch.setattr(parts, "MOST_TOKENS", 7)
        (found,) = pipe.transformer(**inputs(2))
        handle.undo()
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
