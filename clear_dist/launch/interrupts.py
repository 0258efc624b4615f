"""Ctrl-C and its kin: the process ends at once, or unwinds where files or ranks must be cleared up."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from clear_dist.launch import ends, env

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
LAST_WORDS_SECONDS = 0.5
"""Time for a line that another thread of this rank has begun."""
ASKED_ONCE_SECONDS = 1.0
SECONDS_TO_END = 25.0
"""Time that a rank has which ends by itself; torchrun kills it after 30 s."""


@contextmanager
def at_once() -> Iterator[None]:
    """An interrupt ends this process with its line: libraries swallow KeyboardInterrupt while they import."""

    def leave(_: int, __: FrameType | None) -> None:
        os._exit(ends.interrupted())

    with _handled(leave):
        yield


@contextmanager
def unwinding() -> Iterator[None]:
    def unwind(_: int, __: FrameType | None) -> None:
        raise KeyboardInterrupt

    with _handled(unwind):
        yield


@contextmanager
def noted() -> Iterator[Callable[[], bool]]:
    """Whether this process has been asked to end, for work that then does so by itself; a second time it ends at once.

    Launchers ask twice in no time: that is once.
    """
    asked: list[float] = []

    def note(_: int, __: FrameType | None) -> None:
        asked.append(time.monotonic())
        if asked[-1] - asked[0] > ASKED_ONCE_SECONDS:
            raise KeyboardInterrupt

    with _handled(note, ENDING):
        yield lambda: bool(asked)


@contextmanager
def undisturbed() -> Iterator[None]:
    """Hold back signals that end this process, from this thread and from those that it starts meanwhile."""
    signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)


@contextmanager
def heeding_launcher() -> Iterator[None]:
    """torchrun and its kin end all ranks once one is lost, perhaps before they notice: one of them tells."""
    arrived, sent = os.pipe()
    os.set_blocking(sent, False)

    def quiet(_: int, __: FrameType | None) -> None:
        pass

    def listen() -> None:
        while os.read(arrived, 1) != bytes([signal.SIGTERM]):
            pass
        if signal.getsignal(signal.SIGTERM) is not quiet:  # `noted`: work that ends by itself
            time.sleep(SECONDS_TO_END)
        status = ends.ended_by_launcher()
        time.sleep(LAST_WORDS_SECONDS)
        os._exit(status)

    # A thread hears of it even while the main one waits inside a library.
    threading.Thread(target=listen, daemon=True).start()
    handler, before = signal.signal(signal.SIGTERM, quiet), signal.set_wakeup_fd(sent)
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        signal.signal(signal.SIGTERM, handler)


@contextmanager
def _handled(
    handler: Callable[[int, FrameType | None], None], numbers: Sequence[signal.Signals] | None = None
) -> Iterator[None]:
    if numbers is None:  # by SIGTERM a launcher ends its ranks
        numbers = ENDING[:1] if env.is_launched() else ENDING
    before = {number: signal.getsignal(number) for number in numbers}
    # Ignored on purpose: by nohup, by a shell's &, by our own ranks.
    before = {number: old for number, old in before.items() if old != signal.SIG_IGN}
    for number in before:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
