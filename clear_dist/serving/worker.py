"""What all ranks do in a server: wait for the next task, for days if nobody asks, draw it, and wait again.

Rank 0 speaks every few seconds, so that no rank's timeout runs out, and each learns soon that another one is gone.
"""

from collections.abc import Callable
from typing import Protocol

from clear_dist.comm.words import broadcast_bytes
from clear_dist.drawing.many import ItemFailed
from clear_dist.serving.draw import Held, Inputs, Stopped, Unwatched, Watch, draw
from clear_dist.serving.errors import CANCELLED, ApiError, refused, without_folders
from clear_dist.serving.task import Task

BEAT = 2.0
"""Seconds between words of rank 0 while nobody asks."""
NOTHING = b""


class Commission(Protocol):
    """A task as rank 0 has it."""

    @property
    def task(self) -> Task: ...

    @property
    def inputs(self) -> Inputs: ...

    @property
    def watch(self) -> Watch: ...

    def end(self, error: ApiError | None) -> None:
        """Tell whoever waits for it; no error: all files are there."""


def work(held: Held, next_task: Callable[[float], Commission | None] | None, asked_to_end: Callable[[], bool]) -> None:
    """Draw what comes until any rank is asked to end.

    Rank 0 alone has `next_task`, which waits for at most so many seconds. Raises PeerLost where a rank is gone.
    """
    while not held.group.agree(asked_to_end()):
        mine = None if next_task is None else next_task(BEAT)
        word = broadcast_bytes(held.group, NOTHING if mine is None else mine.task.to_json().encode())
        if word == NOTHING:
            continue
        if mine is None:
            _drawn(held, Task.of_json(word.decode()), None, Unwatched())
        else:
            mine.end(_drawn(held, mine.task, mine.inputs, mine.watch))


def _drawn(held: Held, task: Task, inputs: Inputs | None, watch: Watch) -> ApiError | None:
    """Draw; what all ranks fail in alike is the end of this task only."""
    try:
        draw(held, task, inputs, watch)
    except Stopped:
        return CANCELLED
    except ItemFailed as error:
        return ApiError(500, f"the picture could not be written: {without_folders(str(error))}")
    except ValueError as error:
        return refused(error)
    return None
