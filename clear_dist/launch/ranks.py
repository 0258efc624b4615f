"""Start of ranks; their end, whatever it is, becomes one line and an exit status."""

import ctypes
import logging
import multiprocessing
import multiprocessing.connection
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from importlib import import_module
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, cast

from clear_dist.launch import ends, env, streams
from clear_dist.launch.aside import Call, calling
from clear_dist.launch.interrupts import ENDING, at_once, heeding_launcher, undisturbed, unwinding

QUIET = {
    "DIFFUSERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_VERBOSITY": "error",
    "KINETO_LOG_LEVEL": "6",
    "TRANSFORMERS_VERBOSITY": "error",
    "TORCH_CPP_LOG_LEVEL": "FATAL",
    "TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC": "250",  # four times this passes before NCCL's watchdog ends a rank
}
"""Defaults, since libraries would report every lost connection from every rank."""
LOUD = ("torchao", "torch.utils._pytree")
"""Loggers that list kernels of torchao which this torch does not load, wherever torchao is installed."""
MEETING_SECONDS, FAREWELL_SECONDS = 5.0, 5.0
_PR_SET_PDEATHSIG = 1

Work = Callable[[], None]


def run(
    work: Work,
    *,
    nproc: int,
    on_cuda: bool = False,
    traceback: bool = False,
    preload: Sequence[str] = (),
    beside: Callable[[], None] | None = None,
    farewell: float = FAREWELL_SECONDS,
) -> int:
    """Do `work` in this process or, if nobody launched it and nproc > 1, in `nproc` new ones; returns the exit status.

    Args:
        work: a rank's work. An interrupt ends a single rank at once, except inside `interrupts.unwinding`.
        on_cuda: ranks will use CUDA, which does not survive a fork after its first use.
        traceback: print also that of the rank that failed first.
        preload: modules imported before the fork: in each of eight ranks they would cost a minute on two cores.
        beside: waits for a check that has been started already, and raises a Refusal where work may not go on. It is
            called once in this process: before the work here, else in a thread while the new processes run.
        farewell: seconds that ranks have to end once they are asked to, unless that is asked twice.
    """
    hush()
    with at_once():
        here = partial(_work_here, work, preload, beside)
        if env.read().launcher is not None:
            with heeding_launcher():
                return _leave(ends.run_rank(here, traceback=traceback))
        if nproc == 1:
            return ends.run_rank(here, traceback=traceback)
        threads = _share_of_threads(nproc)
        if not on_cuda:
            _import(preload)  # only imports: a fork is safe as long as no parallel region of OpenMP has run
        try:
            with unwinding(), _reserved_port() as port:
                places = [env.variables(rank=rank, size=nproc, port=port, threads=threads) for rank in range(nproc)]
                how: dict[str, Any] = {"on_cuda": on_cuda, "traceback": traceback, "farewell": farewell}
                return _run_ranks(work, places, beside, **how)
        except KeyboardInterrupt:
            return ends.interrupted()


def hush() -> None:
    """Quieten libraries that are not imported yet, in this process; what the user has set stays."""
    # Locks of libraries (tqdm's) have no name then, so that none is told to be left behind by a rank that was ended.
    multiprocessing.set_start_method("fork", force=True)
    for name, level in QUIET.items():
        os.environ.setdefault(name, level)
    for logger in LOUD:
        logging.getLogger(logger).setLevel(logging.ERROR)


def _work_here(work: Work, preload: Sequence[str], beside: Callable[[], None] | None) -> None:
    _import(preload)  # what the work imports anyway: meanwhile the check goes on
    if beside is not None:
        beside()
    work()


def _import(names: Sequence[str]) -> None:
    for name in names:
        import_module(name)


def _run_ranks(
    work: Work,
    places: list[dict[str, str]],
    beside: Callable[[], None] | None,
    *,
    on_cuda: bool,
    traceback: bool,
    farewell: float,
) -> int:
    # mypy knows no common class of contexts that has Process.
    context: Any = multiprocessing.get_context("spawn" if on_cuda else "fork")
    pipes = [context.Pipe(duplex=False) for _ in places]
    processes = [
        context.Process(target=_be_rank, args=(work, place, os.getpid(), outbox))
        for place, (_, outbox) in zip(places, pipes, strict=True)
    ]
    causes: list[ends.Cause] = []
    try:
        with undisturbed():
            for process in processes:
                process.start()
        # A thread starts after the forks: they would copy the locks that it holds.
        with calling(beside) as call:
            raised = _wait(processes, [inbox for inbox, _ in pipes], causes, call)
    finally:
        with undisturbed():
            # Before the rest is ended: only those that ended by themselves tell what happened.
            statuses = {rank: process.exitcode for rank, process in enumerate(processes)}
            _end(processes, farewell)
    return ends.conclude(statuses, causes, traceback=traceback, beside=raised)


def _be_rank(work: Work, variables: dict[str, str], launcher: int, outbox: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the launcher decides, and tells
    for number in ENDING[1:]:
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)
    die_with(launcher)
    hush()  # a process that was started afresh has loud loggers again
    os.environ.update(variables)
    with streams.there():  # a process that was started afresh has those of Python again
        _leave(ends.run_rank(work, traceback=False, outbox=outbox))


def _leave(status: int) -> int:
    """End a rank that failed at once: tearing down torch.distributed would wait for the others."""
    with suppress(OSError):  # which has been told, where it was a result
        sys.stdout.flush()
        sys.stderr.flush()
    if status:
        os._exit(status)
    return status


def _share_of_threads(size: int) -> int | None:
    if "OMP_NUM_THREADS" in os.environ:
        return None
    threads = max(1, len(os.sched_getaffinity(0)) // size)
    os.environ["OMP_NUM_THREADS"] = str(threads)  # before torch is imported, here or in a rank
    return threads


def _wait(
    processes: list[BaseProcess], inboxes: list[Connection], causes: list[ends.Cause], call: Call
) -> BaseException | None:
    """Wait until all ranks have ended, one has failed or `call` has raised what is returned; adds to `causes`."""
    running = {process.sentinel: process for process in processes}
    deadline: float | None = None
    while running and call.raised is None:
        timeout = None if deadline is None else max(0.0, deadline - time.monotonic())
        for ready in multiprocessing.connection.wait([*running, *call.awaited], timeout):
            if ready in call.awaited:
                call.awaited.clear()
                continue
            process = running.pop(cast(int, ready))
            process.join()
        failed = [process.exitcode for process in processes if process.exitcode]
        causes += [inbox.recv() for inbox in inboxes if inbox.poll()]  # a rank has one at most
        known = any(not cause.lost for cause in causes) or any(code < 0 and code != -signal.SIGABRT for code in failed)
        if known or (deadline and time.monotonic() >= deadline):
            return None
        if failed and deadline is None:
            # It lost a peer, or NCCL's watchdog ended it; the peer's end, which is the cause, is about to be seen.
            deadline = time.monotonic() + MEETING_SECONDS
    return call.raised if running else None


def _end(processes: list[BaseProcess], farewell: float) -> None:
    started = [process for process in processes if process.pid is not None]
    for process in started:
        process.terminate()
    deadline = time.monotonic() + farewell
    while any(process.is_alive() for process in started) and time.monotonic() < deadline:
        if signal.sigpending() & set(ENDING):  # held back: asked again
            break
        multiprocessing.connection.wait([process.sentinel for process in started if process.is_alive()], 0.1)
    for process in started:
        process.kill()
        process.join()


def die_with(launcher: int) -> None:
    """Have the kernel kill this process when the launcher dies, even by SIGKILL."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != launcher:
        os._exit(1)


@contextmanager
def _reserved_port() -> Iterator[int]:
    """Port bound but not listening, so that no other program gets it and rank 0 can still listen on it."""
    with socket.socket() as reserved:
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        reserved.bind(("127.0.0.1", 0))
        yield reserved.getsockname()[1]
