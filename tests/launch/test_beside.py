"""A check that is waited for beside the ranks: it refuses, breaks, outlasts them; whatever it does, nothing stays."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from clear_dist.launch import ranks
from clear_dist.options import Refusal
from tests.launch.test_ranks import REST, ROOT, ended, finish, wait_for_ranks

SCRIPT = """
import os, signal, sys, time
from clear_dist.launch import env, ranks
from clear_dist.options import Refusal


def ready():
    os.write(1, f"ready {{os.getpid()}}\\n".encode())


def work():
    rank = env.read().rank
    {work}


def beside():
    {beside}


if __name__ == "__main__":
    sys.exit(ranks.run(work, beside=beside, {settings}))

{imported}
"""
READY_AND_REST = f"ready()\n{REST}"
ONCE_TOLD = "os.read(0, 1)\n"
"""Waits until the test closes this process's stdin, as `finish` does."""
REFUSE = "raise Refusal('it does not fit; nearest: 3')"
REFUSED = (2, ["clear-dist: it does not fit; nearest: 3"])
TORCHRUN = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}

Begin = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def begin(tmp_path: Path) -> Iterator[Begin]:
    """Starts a launcher; in the end none of its processes may be there, and none of its temporary files."""
    temporary, started = tmp_path / "temporary", []
    temporary.mkdir()

    def begin(
        beside: str,
        work: str = READY_AND_REST,
        *,
        imported: str = "",
        place: dict[str, str] | None = None,
        **given: object,
    ) -> subprocess.Popen[str]:
        script = tmp_path / "ranks.py"
        settings = ", ".join(f"{name}={value!r}" for name, value in ({"nproc": 3} | given).items())
        work, beside = (body.replace("\n", "\n    ") for body in (work, beside))
        script.write_text(SCRIPT.format(work=work, beside=beside, settings=settings, imported=imported))
        process = subprocess.Popen(
            [sys.executable, str(script)],
            env=os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(temporary)} | (place or {}),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield begin
    for process in started:
        try:
            assert process.poll() is not None
            assert ended(of_session(process.pid))
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()
    assert not list(temporary.iterdir())


def of_session(number: int) -> list[int]:
    """Processes of a session, also those that their parents have left."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            session = int((folder / "stat").read_text().rpartition(")")[2].split()[3])
        except OSError:  # it has ended meanwhile
            continue
        if session == number:
            found.append(int(folder.name))
    return found


@pytest.mark.parametrize("on_cuda", [False, True])
def test_a_refusal_ends_ranks_at_work(begin: Begin, on_cuda: bool) -> None:
    process = begin(ONCE_TOLD + REFUSE, on_cuda=on_cuda)
    pids = wait_for_ranks(process)
    assert finish(process) == REFUSED
    assert ended(pids)


def test_a_refusal_ends_ranks_that_import(begin: Begin) -> None:
    imported = f"if __name__ != '__main__':\n    ready()\n    {REST}"
    process = begin(ONCE_TOLD + REFUSE, "os.write(2, b'at work')", imported=imported, on_cuda=True)
    pids = wait_for_ranks(process)
    assert finish(process) == REFUSED
    assert ended(pids)


@pytest.mark.parametrize("on_cuda", [False, True])
def test_a_refusal_as_soon_as_ranks_start(begin: Begin, on_cuda: bool) -> None:
    assert finish(begin(REFUSE, REST, on_cuda=on_cuda)) == REFUSED


def test_ranks_that_a_refusal_ends_have_no_say(begin: Begin) -> None:
    words = "def fail(*_): raise RuntimeError('my own words')\nsignal.signal(signal.SIGTERM, fail)\n"
    process = begin(ONCE_TOLD + REFUSE, words + READY_AND_REST)
    wait_for_ranks(process)
    assert finish(process) == REFUSED


def test_a_rank_that_a_refusal_ends_and_that_does_not_listen(begin: Begin) -> None:
    process = begin(ONCE_TOLD + REFUSE, f"signal.signal(signal.SIGTERM, signal.SIG_IGN)\n{READY_AND_REST}")
    pids = wait_for_ranks(process)
    assert finish(process) == REFUSED
    assert ended(pids)


def test_alone_work_waits_for_what_was_started_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "imported_early.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    seen: list[str] = []

    def beside() -> None:
        seen.append(f"beside {'imported_early' in sys.modules} {os.getpid()}")

    def refuse() -> None:
        raise Refusal("it does not fit; nearest: 3")

    def work() -> None:
        seen.append("work")

    assert ranks.run(work, nproc=1, preload=("imported_early",), beside=beside) == 0
    assert seen == [f"beside True {os.getpid()}", "work"]
    assert ranks.run(work, nproc=1, beside=refuse) == 2
    assert seen[2:] == []
    assert capsys.readouterr().err == "clear-dist: it does not fit; nearest: 3\n"


def test_a_refusal_under_torchrun(begin: Begin, tmp_path: Path) -> None:
    place = TORCHRUN | {"TORCHELASTIC_ERROR_FILE": str(tmp_path / "0" / "error.json")}
    assert finish(begin(REFUSE, "os.write(2, b'at work')", place=place)) == REFUSED


@pytest.mark.parametrize(
    ("nproc", "who", "raised"),
    [(3, "", "ValueError('odd')"), (1, "rank 0 ", "ValueError('odd')"), (3, "", "SystemExit('odd')")],
)
def test_a_check_that_breaks(begin: Begin, nproc: int, who: str, raised: str) -> None:
    line = f"clear-dist: {who}failed: {raised.partition('(')[0]}: odd (for the traceback: --traceback)"
    assert finish(begin(f"raise {raised}", REST, nproc=nproc)) == (1, [line])
    status, lines = finish(begin(f"raise {raised}", REST, nproc=nproc, traceback=True))
    assert (status, lines[0]) == (1, line)
    assert any("in beside" in each for each in lines)


def test_a_rank_that_fails_first_is_told(begin: Begin) -> None:
    process = begin(REST, f"if rank == 1: raise RuntimeError('bad')\n{REST}")
    assert finish(process) == (1, ["clear-dist: rank 1 failed: RuntimeError: bad (for the traceback: --traceback)"])


def test_a_rank_that_fails_after_the_check_has_passed(begin: Begin, tmp_path: Path) -> None:
    passed = tmp_path / "passed"
    until_passed = f"while not os.path.exists({str(passed)!r}): time.sleep(0.05)\n"
    process = begin(f"open({str(passed)!r}, 'w').close()", f"{until_passed}if rank == 1: raise KeyError\n{REST}")
    assert finish(process) == (1, ["clear-dist: rank 1 failed: KeyError (for the traceback: --traceback)"])


@pytest.mark.parametrize(("nproc", "ready"), [(1, 1), (3, 4)])
@pytest.mark.parametrize(
    "interrupt", [lambda pid: os.killpg(pid, signal.SIGINT), lambda pid: os.kill(pid, signal.SIGTERM)]
)
def test_interrupts_while_it_waits(begin: Begin, nproc: int, ready: int, interrupt: Callable[[int], None]) -> None:
    process = begin(READY_AND_REST, nproc=nproc)
    wait_for_ranks(process, ready)  # the check, and ranks if it does not hold them up
    interrupt(process.pid)
    assert finish(process) == (130, ["clear-dist: interrupted"])


def test_a_second_interrupt_does_not_save_ranks(begin: Begin) -> None:
    """Its thread must not take signals that the main one holds back while it ends ranks."""
    heard = "signal.signal(signal.SIGTERM, lambda *_: ready())\n"
    process = begin(READY_AND_REST, f"{heard}{READY_AND_REST}")
    pids = {*wait_for_ranks(process, 4)} - {process.pid}
    os.kill(process.pid, signal.SIGINT)
    wait_for_ranks(process)  # they have been told to end, and do not
    os.kill(process.pid, signal.SIGINT)
    assert finish(process) == (130, ["clear-dist: interrupted"])
    assert ended([*pids])


@pytest.mark.parametrize("on_cuda", [False, True])
def test_ranks_that_are_done_do_not_wait_for_it(begin: Begin, on_cuda: bool) -> None:
    assert finish(begin(REST, "pass", on_cuda=on_cuda)) == (0, [])


def test_it_is_called_once_and_in_no_rank(begin: Begin, tmp_path: Path) -> None:
    called = tmp_path / "called"
    tell = f"os.write(os.open({str(called)!r}, os.O_CREAT | os.O_APPEND | os.O_WRONLY), b'%d\\n' % os.getpid())"
    until_told = f"while not (os.path.exists({str(called)!r}) and os.path.getsize({str(called)!r})): time.sleep(0.05)"
    process = begin(tell, until_told)
    assert finish(process) == (0, [])
    assert called.read_text() == f"{process.pid}\n"
