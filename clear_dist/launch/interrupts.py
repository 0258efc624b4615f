"""Ctrl-C and its kin: the process ends at once, or unwinds where files or ranks must be cleared up."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from clear_dist.launch import ends, env

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


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
def _handled(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    # A rank's launcher ends it by SIGTERM, of which it must not speak.
    numbers = ENDING[:1] if env.launched_by_torchrun() else ENDING
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
