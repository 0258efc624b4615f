"""Work that may take longer than the group's timeout."""

import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import TypeVar

import torch

from clear_dist.comm.group import Group

SECONDS_BETWEEN_WORDS = 1.0
"""Interval of messages among ranks while one is busy."""

Result = TypeVar("Result")


def in_touch(group: Group, work: Callable[[], Result]) -> Result:
    """Result of `work`, done on a thread, once all ranks are done; raises its error, or PeerLost for another rank's."""
    inference_mode = torch.is_inference_mode_enabled()

    def as_here() -> Result:
        if group.device.type == "cuda":
            torch.cuda.set_device(group.device)
        with torch.inference_mode(inference_mode):
            return work()

    doing, underway = in_background(as_here), True
    while underway:
        wait([doing], SECONDS_BETWEEN_WORDS)
        if done := doing.done():
            doing.result()  # its error, if any, before others are told that this rank is done
        underway = group.agree(not done)
    return doing.result()


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
