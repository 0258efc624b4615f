"""How runs end: ranks that raise, that are killed, that are interrupted; launchers that die."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from clear_dist.launch import ends, ranks
from tests.patience import PATIENCE

ROOT = Path(__file__).parents[2]
SCRIPT = """
import os, pathlib, signal, sys, time
from clear_dist.launch import env, ranks
from clear_dist.options import Refusal


def work():
    rank = env.read().rank
    os.write(1, f"ready {{os.getpid()}}\\n".encode())
    here = pathlib.Path(__file__).parent
    (here / f"{{rank}}.there").touch()
    while len(list(here.glob("*.there"))) < 3:
        time.sleep(0.01)
    {body}

if __name__ == "__main__":
    sys.exit(ranks.run(work, nproc=3, on_cuda={on_cuda}, traceback={traceback}))
"""
REST = f"time.sleep({60 * PATIENCE})"


def start(folder: Path, body: str, *, traceback: bool = False, on_cuda: bool = False) -> subprocess.Popen[str]:
    script = folder / "ranks.py"
    script.write_text(SCRIPT.format(body=body.replace("\n", "\n    "), traceback=traceback, on_cuda=on_cuda))
    return subprocess.Popen(
        [sys.executable, str(script)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_for_ranks(process: subprocess.Popen[str], size: int = 3) -> list[int]:
    assert process.stdout is not None
    return [int(process.stdout.readline().split()[1]) for _ in range(size)]


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def ended(pids: list[int], seconds: float = 5.0 * PATIENCE) -> bool:
    deadline = time.monotonic() + seconds
    while any(is_alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not any(is_alive(pid) for pid in pids)


def finish(process: subprocess.Popen[str]) -> tuple[int, list[str]]:
    """Exit status and the lines on stderr."""
    _, errors = process.communicate()
    return process.returncode, errors.splitlines()


def test_a_rank_that_raises_takes_the_others_with_it(tmp_path: Path) -> None:
    process = start(tmp_path, f"if rank == 1: raise RuntimeError('out of\\nluck')\n{REST}")
    pids = wait_for_ranks(process)
    status, lines = finish(process)
    assert status == 1
    assert lines == ["clear-dist: rank 1 failed: RuntimeError: out of luck (for the traceback: --traceback)"]
    assert ended(pids)


def test_ranks_for_cuda_are_started_afresh(tmp_path: Path) -> None:
    process = start(tmp_path, f"if rank == 1: raise RuntimeError('bad')\n{REST}", on_cuda=True)
    pids = wait_for_ranks(process)
    status, lines = finish(process)
    assert (status, len(lines)) == (1, 1)
    assert lines[0].startswith("clear-dist: rank 1 failed: RuntimeError: bad")
    assert ended(pids)


@pytest.mark.parametrize("on_cuda", [False, True])
def test_a_failed_rank_is_all_that_is_told(tmp_path: Path, on_cuda: bool) -> None:
    """Neither what torchao says while it is imported, nor locks that nobody could give back, as of a progress bar."""
    body = f"""
import logging, multiprocessing
logging.getLogger("torchao").warning("no kernels")
logging.getLogger("torch.utils._pytree").warning("deprecated")
lock = multiprocessing.RLock()
if rank == 1: raise RuntimeError("bad")
{REST}
"""
    line = "clear-dist: rank 1 failed: RuntimeError: bad (for the traceback: --traceback)"
    assert finish(start(tmp_path, body, on_cuda=on_cuda)) == (1, [line])


def test_the_traceback_on_request(tmp_path: Path) -> None:
    process = start(tmp_path, f"if rank == 2: raise KeyError('gone')\n{REST}", traceback=True)
    status, lines = finish(process)
    assert status == 1
    assert lines[0].startswith("clear-dist: rank 2 failed: KeyError")
    assert any("in work" in line for line in lines)


def test_a_refusal_on_every_rank_is_told_once(tmp_path: Path) -> None:
    process = start(tmp_path, "raise Refusal('the rule, the value; nearest: 3')")
    assert finish(process) == (2, ["clear-dist: the rule, the value; nearest: 3"])


@pytest.mark.parametrize(("number", "guess"), [(signal.SIGKILL, " (out of memory?)"), (signal.SIGSEGV, "")])
def test_a_rank_that_is_killed(tmp_path: Path, number: signal.Signals, guess: str) -> None:
    process = start(tmp_path, f"if rank == 2: os.kill(os.getpid(), {int(number)})\n{REST}")
    pids = wait_for_ranks(process)
    assert finish(process) == (1, [f"clear-dist: rank 2 was killed by {number.name}{guess}"])
    assert ended(pids)


@pytest.mark.parametrize(
    "interrupt", [lambda pid: os.killpg(pid, signal.SIGINT), lambda pid: os.kill(pid, signal.SIGTERM)]
)
def test_interrupts_end_everything(tmp_path: Path, interrupt: Callable[[int], None]) -> None:
    process = start(tmp_path, REST)
    pids = wait_for_ranks(process)
    interrupt(process.pid)
    assert finish(process) == (130, ["clear-dist: interrupted"])
    assert ended(pids)


def test_ranks_that_do_not_listen_are_killed(tmp_path: Path) -> None:
    process = start(tmp_path, f"if rank == 0: raise ValueError\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n{REST}")
    pids = wait_for_ranks(process)
    status, lines = finish(process)
    assert (status, len(lines)) == (1, 1)
    assert ended(pids)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGQUIT, signal.SIGUSR1])
def test_ranks_die_with_a_launcher_that_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    process = start(tmp_path, REST)
    pids = wait_for_ranks(process)
    process.send_signal(number)
    assert ended(pids)
    process.communicate()
    assert not list(temporary.iterdir())


def test_one_rank_runs_in_this_process(capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[int] = []
    assert ranks.run(lambda: seen.append(os.getpid()), nproc=1) == 0
    assert seen == [os.getpid()]

    def fail() -> None:
        raise OSError("no space")

    assert ranks.run(fail, nproc=1) == 1
    assert "rank 0 failed: OSError: no space" in capsys.readouterr().err


def test_under_torchrun_one_rank_speaks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for rank in (1, 0):
        place = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank, "MASTER_ADDR": "localhost", "MASTER_PORT": 1}
        for name, value in (place | {"TORCHELASTIC_ERROR_FILE": tmp_path / str(rank) / "error.json"}).items():
            monkeypatch.setenv(name, str(value))
        before = signal.getsignal(signal.SIGTERM)
        assert ends.refuse("wrong") == 2
        signal.signal(signal.SIGTERM, before)
    assert capsys.readouterr().err == "clear-dist: wrong\n"


def test_ranks_that_nobody_speaks_for_speak_themselves(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Lost(RuntimeError):
        pass

    def lose() -> None:
        raise Lost("rank 1 is gone: closed by peer")

    def fail() -> None:
        raise OSError("no space")

    def be_interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setitem(sys.modules, "clear_dist.comm.group", SimpleNamespace(PeerLost=Lost))  # type: ignore[arg-type]
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(ends, "SECONDS_FOR_THE_CAUSE", 0.0)
    statuses = []
    for rank, work in ((1, fail), (0, lose), (1, be_interrupted), (0, be_interrupted)):
        place = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank, "MASTER_ADDR": "localhost", "MASTER_PORT": 1}
        for name, value in place.items():
            monkeypatch.setenv(name, str(value))
        statuses.append(ends.run_rank(work, traceback=False))
    assert statuses == [1, 1, 130, 130]
    more = "(for the traceback: --traceback)"
    assert capsys.readouterr().err.splitlines() == [
        f"clear-dist: rank 1 failed: OSError: no space {more}",
        f"clear-dist: rank 0 lost contact with another rank: rank 1 is gone: closed by peer {more}",
        "clear-dist: interrupted",
    ]


def test_an_error_on_every_rank_is_told_once(tmp_path: Path) -> None:
    status, lines = finish(start(tmp_path, "raise RuntimeError('not finite')"))
    assert (status, len(lines)) == (1, 1)
    assert lines[0].endswith("failed: RuntimeError: not finite (for the traceback: --traceback)")


@pytest.mark.parametrize("told", [None, "2,1"])
def test_ranks_share_the_cores_unless_openmp_was_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: str | None
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if told is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", told)
    process = start(tmp_path, "os.write(2, f'{env.read().threads}\\n'.encode())")
    share = max(1, len(os.sched_getaffinity(0)) // 3) if told is None else None
    assert finish(process) == (0, [str(share)] * 3)


def test_an_ignored_hangup_stays_ignored(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    process = start(tmp_path, "time.sleep(0.5)")
    signal.signal(signal.SIGHUP, before)
    wait_for_ranks(process)
    os.kill(process.pid, signal.SIGHUP)
    assert finish(process) == (0, [])


def test_a_long_cause_stays_on_one_line() -> None:
    line = ends.describe(RuntimeError("a\n" * 2000))
    assert "\n" not in line
    assert len(line) < 700
    assert ends.describe(ValueError()) == "ValueError"
