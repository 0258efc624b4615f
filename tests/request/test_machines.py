"""What the command line says to machines with GPUs, before anything is loaded; driver and torch are stand-ins."""

import ctypes
from collections.abc import Callable
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from clear_dist.commands import app
from clear_dist.launch import ranks
from clear_dist.request import devices
from clear_dist.request.describe_gpus import describe
from tests.request.test_describe_gpus import Driver, Library

CUDA_13 = {"__version__": "2.14.1+cu130", "cuda": "13.0"}
Have = Callable[..., None]


class Machine(Driver):
    """libcuda with a device of each name."""

    def __init__(self, *names: str, knows: int = 13_000, failing: int = 0) -> None:
        super().__init__(len(names), failing)
        self.names, self.knows = names, knows

    def cuDeviceGetName(self, name: Any, length: int, device: Any) -> int:  # noqa: N802
        name.value = self.names[device.value].encode()
        return 0

    def cuDriverGetVersion(self, version: Any) -> int:  # noqa: N802
        version._obj.value = self.knows
        return 0


@pytest.fixture
def have(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Have:
    """Sets up driver, management library and torch; no ranks are started, but the check beside them is made."""
    monkeypatch.chdir(tmp_path)
    for name in ("CUDA_VISIBLE_DEVICES", "RANK"):
        monkeypatch.delenv(name, raising=False)

    def run(work: object, *, beside: Callable[[], None] | None = None, **_: object) -> int:
        if beside is not None:
            beside()
        return 0

    def have(driver: Machine | None, torch: dict[str, str | None] = CUDA_13, library: Library | None = None) -> None:
        def load(name: str | None) -> Machine:
            if driver is None or name != devices.DRIVER:
                raise OSError(f"{name}: cannot open shared object file")
            return driver

        def answer(*_: object, **__: object) -> SimpleNamespace:
            with redirect_stderr(StringIO()) as errors:
                lines = list(describe(driver, library))
            return SimpleNamespace(stdout="\n".join(lines), stderr=errors.getvalue())

        monkeypatch.setattr(ctypes, "CDLL", load)
        monkeypatch.setattr(devices.subprocess, "run", answer)
        monkeypatch.setattr(devices.runpy, "run_path", lambda _: torch)

    monkeypatch.setattr(ranks, "run", run)
    return have


CASES: dict[str, tuple[Machine | None, dict[str, str | None], dict[str, str], str]] = {
    "no driver": (
        None,
        CUDA_13,
        {},
        "--device cuda needs a GPU that CUDA sees, got no NVIDIA driver (libcuda.so.1); nearest: its installation, in a "
        "container docker run --gpus all, or --device cpu",
    ),
    "hidden": (
        Machine(failing=100),
        CUDA_13,
        {"CUDA_VISIBLE_DEVICES": ""},
        "--device cuda needs a GPU that CUDA sees, got none by CUDA_VISIBLE_DEVICES=''; nearest: unset "
        "CUDA_VISIBLE_DEVICES, or --device cpu",
    ),
    "not ready": (
        Machine("NVIDIA H100", failing=802),
        CUDA_13,
        {},
        "--device cuda needs a GPU that CUDA sees, got CUDA_ERROR_SYSTEM_NOT_READY from the driver; nearest: what "
        "nvidia-smi advises, or --device cpu",
    ),
    "torch for CPUs": (
        Machine(*["NVIDIA H100"] * 8, knows=12_080),
        {"__version__": "2.13.0+cpu", "cuda": None},
        {},
        "torch must see the GPUs of this machine (8), got torch 2.13.0+cpu, which was built without CUDA; nearest: pip "
        "install torch for CUDA 12.8 from the index that pytorch.org/get-started names, or --device cpu",
    ),
    "an old driver": (
        Machine("NVIDIA H100", knows=12_080),
        CUDA_13,
        {},
        "torch must see the GPUs of this machine (1), got torch for CUDA 13.0 and a driver for CUDA 12.8; nearest: a "
        "newer driver, torch for CUDA 12.8 from the index that pytorch.org/get-started names, or --device cpu",
    ),
}


@pytest.mark.parametrize("command", ["generate", "verify"])
@pytest.mark.parametrize("case", CASES)
def test_what_cannot_run_on_gpus_is_refused(
    case: str, command: str, have: Have, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    driver, torch, environment, line = CASES[case]
    have(driver, torch)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert app.run([command, "--device", "cuda"]) == 2
    assert capsys.readouterr() == ("", f"clear-dist: {line}\n")
    if driver is None or driver.failing:  # where nobody asked for GPUs, none are missed
        assert app.run([command, "--model", "demo"] if command == "generate" else [command]) == 0
    else:
        assert app.run([command]) == 2


def test_a_minor_version_of_cuda_is_no_reason(have: Have) -> None:
    have(Machine("NVIDIA H100", knows=13_000), {"__version__": "2.15.0", "cuda": "13.2"})
    assert app.run(["generate", "--model", "demo"]) == 0


def test_gpus_of_two_kinds_are_told_of(have: Have, capsys: pytest.CaptureFixture[str]) -> None:
    have(Machine("NVIDIA H100", "NVIDIA T400", "NVIDIA H100"))
    assert app.run(["generate", "--model", "demo"]) == 0
    line = (
        "clear-dist: warning: ranks are on NVIDIA H100 and NVIDIA T400: the slowest and the smallest decide; "
        "CUDA_VISIBLE_DEVICES chooses"
    )
    assert capsys.readouterr().err.splitlines().count(line) == 1
    assert app.run(["generate", "--model", "demo", "--nproc", "1"]) == 0
    assert "NVIDIA T400" not in capsys.readouterr().err


def test_more_ranks_than_gpus_are_started(have: Have) -> None:
    """What their messages go through is told once they have met: `test_sharing.py`."""
    have(Machine("NVIDIA H100"))
    assert app.run(["generate", "--model", "demo", "--nproc", "2"]) == 0


def test_a_gpu_that_is_nearly_full_is_refused(have: Have, capsys: pytest.CaptureFixture[str]) -> None:
    have(Machine("NVIDIA H100"), library=Library("GPU", 20 * 10**6))
    assert app.run(["generate", "--model", "demo"]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("clear-dist: rank 0 must fit in the 0.0 GB that are free on GPU 0, got ")
    assert "; nearest: " in last
