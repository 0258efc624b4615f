"""Without a GPU: that the kernels fit together in the engine. Triton must not be imported before it is to interpret."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

FILE = Path(__file__).with_name("interpreted_engine.py")


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is made for Linux only")
def test_pictures_in_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-n0", "-pno:cacheprovider", "--noconftest", str(FILE)]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, cwd=FILE.parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
