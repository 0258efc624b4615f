"""How a run ends: one line from whoever knows the cause, and an exit status, which functions that tell return.

0 done, 2 the request is wrong, 1 it failed while running, 3 some of a list did, 130 interrupted.
"""

import os
import re
import signal
import sys
import time
import traceback as tracebacks
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection

from clear_dist.launch import env
from clear_dist.options import Refusal

REFUSED, FAILED, PARTLY_FAILED, INTERRUPTED = 2, 1, 3, 130
LONGEST_CAUSE, LONGEST_TRACEBACK = 600, 30_000
"""Characters; a pipe holds 64 KB that nobody reads as yet."""
SECONDS_FOR_THE_CAUSE = 1.0
"""Time for it to be told under another launcher: the first rank that speaks is the only one."""
GUESSES = {
    signal.SIGKILL: " (out of memory?)",
    signal.SIGABRT: " (what a library said stands above; NCCL's watchdog: another rank did not answer)",
}
"""abort() may follow from another rank's end, so that a cause that is told goes before it."""
NO_GPU_MEMORY = r"CUDA (error: )?out of memory|CU\w+_STATUS_ALLOC_FAILED"
"""Found in errors of torch, its allocator (whose advice on itself is left out), CUDA, cuBLAS and cuDNN."""
LESS_MEMORY = "clear-dist plan names settings that take less (a smaller --res, --offload, --int8)"
SHOW_CURSOR = "\x1b[?25h"
HOW_TO_SEE_MORE = "(for the traceback: --traceback)"


class Failure(Exception):
    """A failure whose message tells all: nothing broke, so no traceback is shown."""

    status = FAILED


class PartlyFailed(Failure):
    """Some of a list failed, and all others are there."""

    status = PARTLY_FAILED


@dataclass(frozen=True, kw_only=True)
class Cause:
    rank: int
    status: int
    line: str
    traceback: str
    seconds: float
    """Wall clock; the first of several causes speaks."""
    lost: bool = False
    """Whether it only follows from another rank's end, and speaks where none has told that."""


def run_rank(work: Callable[[], None], *, traceback: bool, outbox: Connection | None = None) -> int:
    """Do a rank's work; a failure is told through `outbox`, which its launcher reads, else by this process."""
    place = env.read()
    try:
        work()
    except KeyboardInterrupt:
        return interrupted() if outbox is None else INTERRUPTED
    except (Refusal, Failure) as error:
        status = REFUSED if isinstance(error, Refusal) else error.status
        cause = _cause(place, status, str(error), error)
    except Exception as error:
        lost = _lost_peer(error) if place.launcher is not None else None
        what = f"failed: {describe(error)}" if lost is None else f"lost contact with another rank: {lost}"
        cause = _cause(place, FAILED, f"rank {place.rank} {what} {HOW_TO_SEE_MORE}", error)
        cause = replace(cause, lost=lost is not None)
    else:
        return 0
    if outbox is None:
        if cause.lost:
            time.sleep(SECONDS_FOR_THE_CAUSE)
        return _tell(place, cause, traceback=traceback)
    outbox.send(cause)
    return cause.status


def refuse(message: str) -> int:
    """Tell that the request is wrong, once even where several ranks find it out."""
    place = env.read()
    return _tell(place, _cause(place, REFUSED, message, None), traceback=False)


def fail(error: BaseException, *, traceback: bool) -> int:
    place = env.read()
    line = str(error) if isinstance(error, Failure) else f"failed: {describe(error)} {HOW_TO_SEE_MORE}"
    cause = _cause(place, FAILED, line, error)
    return _tell(place, cause, traceback=traceback)


def interrupted() -> int:
    place = env.read()
    if place.launcher is None:
        _restore_terminal()
    return _tell(place, _cause(place, INTERRUPTED, "interrupted", None), traceback=False)


def ended_by_launcher() -> int:
    """Tell it where no rank of this machine has told why; called outside the main thread."""
    place = env.read()
    line = f"rank {place.rank} was ended by {place.launcher}, which lost another rank or was ended itself"
    cause = _cause(place, FAILED, line, None)
    return _print(cause, traceback=False) if _speaks(place, cause) else cause.status


def conclude(
    statuses: Mapping[int, int | None],
    causes: Iterable[Cause],
    *,
    traceback: bool,
    beside: BaseException | None = None,
) -> int:
    """Tell what the ranks' statuses mean (None: still at work, -n: killed by signal n).

    Args:
        beside: what ended the ranks instead of one of them.
    """
    if beside is not None:
        _restore_terminal()
        return refuse(str(beside)) if isinstance(beside, Refusal) else fail(beside, traceback=traceback)
    failed = {rank: status for rank, status in statuses.items() if status}
    if not failed:
        return 0
    if set(failed.values()) == {INTERRUPTED}:
        return interrupted()
    _restore_terminal()
    told = sorted(causes, key=lambda cause: (cause.lost, cause.seconds))
    follows = {-signal.SIGABRT} if told and not told[0].lost else set()
    killed = {rank: -status for rank, status in failed.items() if status < 0 and status not in follows}
    if killed:
        rank, number = min(killed.items(), key=lambda item: item[1] == signal.SIGABRT)
        by = signal.Signals(number)
        say(f"rank {rank} was killed by {by.name}{GUESSES.get(by, '')}")
        return FAILED
    if told:
        return _print(told[0], traceback=traceback)
    rank, status = next(iter(failed.items()))
    say(f"rank {rank} ended with status {status} and did not say why")
    return FAILED


def say(line: str) -> None:
    """Write one line to stderr: stdout is for the result."""
    with suppress(OSError, AttributeError):  # a script may have no stderr, or one that is full
        sys.stderr.write(f"clear-dist: {line}\n")  # in one piece: print would write the end of the line by itself
        sys.stderr.flush()


def describe(error: BaseException) -> str:
    text = f"{type(error).__name__}: {error}".rstrip(": ")
    text = " ".join(text.split())
    if re.search(NO_GPU_MEMORY, text):
        cause = re.split(r"(?<= is free)\.|(?<=error: out of memory) ", text)[0]
        return f"{cause}; {LESS_MEMORY}"
    return text if len(text) <= LONGEST_CAUSE else text[:LONGEST_CAUSE] + " ..."


def _restore_terminal() -> None:
    """A rank that was ended while it drew progress leaves the cursor hidden and its line open."""
    if sys.stderr.isatty():
        print(SHOW_CURSOR, file=sys.stderr)


def _cause(place: env.Place, status: int, line: str, error: BaseException | None) -> Cause:
    trace = "".join(tracebacks.format_exception(error))[-LONGEST_TRACEBACK:] if error is not None else ""
    return Cause(rank=place.rank, status=status, line=line, traceback=trace, seconds=time.time())


def _tell(place: env.Place, cause: Cause, *, traceback: bool) -> int:
    if place.launcher is not None:
        # As soon as one rank has ended its launcher terminates the others, this one perhaps in the middle of its line.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    return _print(cause, traceback=traceback) if _speaks(place, cause) else cause.status


def _print(cause: Cause, *, traceback: bool) -> int:
    say(cause.line)
    if traceback and cause.traceback:
        print(cause.traceback, file=sys.stderr, end="", flush=True)
    return cause.status


def _speaks(place: env.Place, cause: Cause) -> bool:
    """Whether no other rank of this machine is known to have spoken."""
    if place.failures is None or not place.failures.is_dir():
        # Each may fail for a reason of its own, but all are interrupted, and refuse a request, alike.
        return place.local_rank == 0 or cause.status == FAILED
    try:
        os.close(os.open(place.failures / "clear_dist_spoke", os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    except FileExistsError:
        return False
    return True


def _lost_peer(error: BaseException | None) -> BaseException | None:
    group = sys.modules.get("clear_dist.comm.group")  # not imported: nothing can have been lost
    while group is not None and error is not None:
        if isinstance(error, group.PeerLost):
            return error
        error = error.__cause__ or error.__context__
    return None
