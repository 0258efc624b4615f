"""The null GPUs themselves, without CUDA: what is replaced, how they are built, memory that is given back."""

import ctypes
import importlib
import runpy
import shutil
import subprocess
from operator import attrgetter
from pathlib import Path

import pytest

from tests.cuda.null_gpu import HERE, build

FEW, MANY = 8, 200


def test_what_is_replaced_has_not_moved() -> None:
    replaced = runpy.run_path(str(HERE / "site" / "sitecustomize.py"))["REPLACED"]
    for module, names in replaced.items():
        for name in names:
            assert callable(attrgetter(name)(importlib.import_module(module)))


def test_a_build_that_failed_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other worker waits, and finds a folder."""
    made: list[Path] = []
    monkeypatch.setattr(subprocess, "run", lambda command, **_: made.append(command[-1]))
    build(tmp_path)
    (tmp_path / "libcuda.so").touch()
    build(tmp_path)
    assert made == [tmp_path]


@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc")
def test_memory_that_is_freed_leaves_no_mapping(tmp_path: Path) -> None:
    """Linux allows a process some 65,000 of them."""
    library, compiler = tmp_path / "services.so", ["gcc", "-O2", "-fPIC", "-shared", "-w"]
    subprocess.run([*compiler, "-o", library, HERE / "stubs" / "services.c"], check=True)
    stubs, blocks = ctypes.CDLL(str(library)), [ctypes.c_void_p() for _ in range(3)]
    before = len(Path("/proc/self/maps").read_text().splitlines())
    for _ in range(MANY):
        for megabytes, block in enumerate(blocks, start=1):
            assert stubs.reserve(ctypes.byref(block), ctypes.c_size_t(megabytes << 20), 0) == 0
        for block in blocks:
            stubs.release(block)
    assert len(Path("/proc/self/maps").read_text().splitlines()) < before + FEW
