"""Functions that may block for seconds, called on a thread beside."""

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

from clear_dist.launch.interrupts import undisturbed

Result = TypeVar("Result")


@dataclass(kw_only=True)
class Call:
    awaited: list[int] = field(default_factory=list)
    """The file that can be read from once the call has ended; none where nothing is called."""
    raised: BaseException | None = None


@contextmanager
def calling(function: Callable[[], None] | None) -> Iterator[Call]:
    """Call it in a thread, which goes on where the call outlasts this: it ends with the process."""
    call = Call()
    if function is None:
        yield call
        return
    ended, running = os.pipe()

    def run() -> None:
        try:
            function()
        except BaseException as error:  # a thread would drop SystemExit
            call.raised = error
        finally:
            os.close(running)

    # The thread holds them back for good: else it would take those that the main thread holds back for a while.
    with undisturbed():
        threading.Thread(target=run, daemon=True).start()
    call.awaited.append(ended)
    try:
        yield call
    finally:
        os.close(ended)


def in_background(work: Callable[[], Result]) -> "Future[Result]":
    """Do `work` on a thread that the process does not wait for at its end: looking up a name may take minutes."""
    doing: Future[Result] = Future()

    def run() -> None:
        try:
            doing.set_result(work())
        except BaseException as error:
            doing.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return doing
