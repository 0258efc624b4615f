"""Work that may take longer than the group's timeout."""

import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from functools import partial
from typing import Any, TypeVar

import torch

from clear_dist.comm.group import Group

SECONDS_BETWEEN_WORDS = 1.0
"""Interval of messages among ranks while one is busy."""

Result = TypeVar("Result")


def in_touch(group: Group, work: Callable[[], Result]) -> Result:
    """Result of `work`, done on a thread, once all ranks are done; raises its error, or PeerLost for another rank's."""
    doing = in_background(partial(_as_here, group.device, torch.is_inference_mode_enabled(), work))
    while group.agree(_is_underway(doing)):
        pass
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


def _as_here(device: torch.device, inference_mode: bool, work: Callable[[], Result]) -> Result:
    if device.type == "cuda":
        torch.cuda.set_device(device)
    with torch.inference_mode(inference_mode):
        return work()


def _is_underway(doing: Future[Any]) -> bool:
    wait([doing], SECONDS_BETWEEN_WORDS)
    if not doing.done():
        return True
    doing.result()
    return False
