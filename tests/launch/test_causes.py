"""Which rank speaks where several end: the one that knows the cause, before those that lost it."""

import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from clear_dist.launch import ends
from tests.launch.test_ranks import REST, finish, start

LOSE = """
from types import SimpleNamespace
class PeerLost(RuntimeError): pass
sys.modules["clear_dist.comm.group"] = SimpleNamespace(PeerLost=PeerLost)
"""


def test_lost_peers_are_silent_and_the_cause_speaks(tmp_path: Path) -> None:
    body = f"""{LOSE}
if rank == 0: raise PeerLost("closed by peer")
time.sleep(0.5)
if rank == 1:
    try: raise PeerLost("closed by peer")
    except PeerLost as error: raise RuntimeError("that followed") from error
raise MemoryError("the cause")
"""
    assert finish(start(tmp_path, body)) == (
        1,
        ["clear-dist: rank 2 failed: MemoryError: the cause (for the traceback: --traceback)"],
    )


def test_what_a_lost_peer_says_is_told_where_no_rank_knows_more(tmp_path: Path) -> None:
    body = f"{LOSE}if rank: os._exit(1)\nraise PeerLost('rank 1 is gone: aborted')"
    status, lines = finish(start(tmp_path, body))
    assert status == 1
    assert lines == [
        "clear-dist: rank 0 lost contact with another rank: rank 1 is gone: aborted (for the traceback: --traceback)"
    ]


def test_ranks_that_end_without_a_word_are_told_of(tmp_path: Path) -> None:
    status, lines = finish(start(tmp_path, "os._exit(3)"))
    assert (status, lines) == (1, ["clear-dist: rank 0 ended with status 3 and did not say why"])


def test_a_cause_goes_before_an_abort_that_follows_from_it(tmp_path: Path) -> None:
    body = "if rank == 0: os.abort()\ntime.sleep(0.5)\nif rank == 2: raise MemoryError('the cause')\n" + REST
    status, lines = finish(start(tmp_path, body))
    assert (status, lines[-1]) == (
        1,
        "clear-dist: rank 2 failed: MemoryError: the cause (for the traceback: --traceback)",
    )


def test_an_abort_that_nothing_explains_is_told(tmp_path: Path) -> None:
    status, lines = finish(start(tmp_path, f"{LOSE}if rank == 0: os.abort()\nraise PeerLost('rank 0 is gone')"))
    assert status == 1
    assert lines[-1].startswith("clear-dist: rank 0 was killed by SIGABRT (what a library said stands above")


def test_under_torchrun_a_lost_peer_lets_the_cause_speak(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Lost(RuntimeError):
        pass

    def lose() -> None:
        raise Lost("rank 1 is gone: closed by peer")

    def another_rank_tells(_: float) -> None:
        (tmp_path / "clear_dist_spoke").touch()

    monkeypatch.setitem(sys.modules, "clear_dist.comm.group", SimpleNamespace(PeerLost=Lost))  # type: ignore[arg-type]
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(ends, "time", SimpleNamespace(time=time.time, sleep=another_rank_tells))
    place = {"RANK": 0, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "MASTER_ADDR": "localhost", "MASTER_PORT": 1}
    for name, value in (place | {"TORCHELASTIC_ERROR_FILE": tmp_path / "0" / "error.json"}).items():
        monkeypatch.setenv(name, str(value))
    assert ends.run_rank(lose, traceback=False) == 1
    assert capsys.readouterr().err == ""


TAKES_LESS = "; clear-dist plan names settings that take less (a smaller --res, --offload, --int8)"
ALLOCATOR = "CUDA out of memory. Tried to allocate 32.00 MiB. GPU 0 has a total capacity of 79.10 GiB of which 19.72 MiB is free"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            torch.OutOfMemoryError(
                f"{ALLOCATOR}. Including non-PyTorch memory, this process has 1 GiB memory in use. Of the allocated memory "
                "1.25 MiB is allocated by PyTorch, and 771.50 KiB is reserved by PyTorch but unallocated. See documentation"
            ),
            f"OutOfMemoryError: {ALLOCATOR}",
        ),
        (
            torch.AcceleratorError(
                "CUDA error: out of memory\nSearch for `cudaErrorMemoryAllocation' in https://docs.nvidia.com/ for more "
                "information.\nCUDA kernel errors might be asynchronously reported at some other API call"
            ),
            "AcceleratorError: CUDA error: out of memory",
        ),
        (
            RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
            "RuntimeError: CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        ),
    ],
    ids=["allocator", "CUDA", "cuBLAS"],
)
def test_memory_that_a_gpu_lacks_is_told_with_what_takes_less(error: RuntimeError, said: str) -> None:
    assert ends.describe(error) == said + TAKES_LESS
