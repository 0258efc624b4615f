"""What GPUs are told to be, with stand-ins for NVIDIA's libraries: there is no GPU here."""

import ctypes
import uuid
from types import SimpleNamespace
from typing import Any

import pytest

from clear_dist.request import devices
from clear_dist.request.describe_gpus import describe

IDENTITY = uuid.UUID("01234567-89ab-cdef-0123-456789abcdef")


class Driver:
    """libcuda with so many devices of 80 GB."""

    def __init__(self, count: int, failing: int = 0) -> None:
        self.count, self.failing = count, failing

    def cuInit(self, flags: int) -> int:  # noqa: N802
        return self.failing

    def cuGetErrorName(self, error: int, name: Any) -> int:  # noqa: N802
        name._obj.value = {100: b"CUDA_ERROR_NO_DEVICE", 802: b"CUDA_ERROR_SYSTEM_NOT_READY"}[error]
        return 0

    def cuDeviceGetCount(self, count: Any) -> int:  # noqa: N802
        count._obj.value = self.count
        return 0

    def cuDeviceGet(self, device: Any, number: int) -> int:  # noqa: N802
        device._obj.value = number
        return 0

    def cuDeviceGetName(self, name: Any, length: int, device: Any) -> int:  # noqa: N802
        name.value = f"NVIDIA H100 number {device.value}".encode()
        return 0

    def cuDeviceGetAttribute(self, value: Any, attribute: int, device: Any) -> int:  # noqa: N802
        value._obj.value = {75: 9, 76: 0}[attribute]
        return 0

    def cuDeviceTotalMem_v2(self, total: Any, device: Any) -> int:  # noqa: N802
        total._obj.value = 80 * 10**9
        return 0

    def cuDeviceGetUuid_v2(self, known: Any, device: Any) -> int:  # noqa: N802
        known[:] = list(IDENTITY.bytes)
        return 0


class Library:
    """libnvidia-ml that knows one device, as a GPU or as a part of one."""

    def __init__(self, kind: str, free: int) -> None:
        self.kind, self.free = kind, free

    def nvmlDeviceGetHandleByUUID(self, word: bytes, handle: Any) -> int:  # noqa: N802
        handle._obj.value = 7
        return int(word.decode() != f"{self.kind}-{IDENTITY}")

    def nvmlDeviceGetMemoryInfo(self, handle: ctypes.c_void_p, memory: Any) -> int:  # noqa: N802
        assert handle.value == 7
        memory[:] = [81 * 10**9, self.free, 3]
        return 0


@pytest.mark.parametrize(
    ("library", "free"),
    [
        (None, 80 * 10**9),
        (Library("GPU", 70 * 10**9), 70 * 10**9),
        (Library("MIG", 9 * 10**9), 9 * 10**9),
        (Library("other", 9), 80 * 10**9),
        (Library("GPU", 81 * 10**9), 80 * 10**9),
    ],
)
def test_devices_are_described(library: Library | None, free: int) -> None:
    lines = list(describe(Driver(2), library))
    assert lines == [f"NVIDIA H100 number {number}|9.0|{80 * 10**9}|{free}" for number in range(2)]


def test_none_where_the_driver_fails(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(describe(Driver(2, failing=802), None)) == []
    assert capsys.readouterr().err == "CUDA_ERROR_SYSTEM_NOT_READY\n"


def test_what_is_described_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = SimpleNamespace(stdout="NVIDIA H200|9.0|150000000000|140000000000\n")
    monkeypatch.setattr(ctypes, "CDLL", lambda name: None)
    monkeypatch.setattr(devices.subprocess, "run", lambda *_, **__: answer)
    found = devices.find_gpus()
    assert found == (devices.FoundGpu(name="NVIDIA H200", capability=9.0, total=150 * 10**9, free=140 * 10**9),)
