"""Work that may take longer than a group waits for a rank that is silent."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, TypeVar

import torch

from clear_dist.comm.group import Group

SECONDS_BETWEEN_WORDS = 1.0

Result = TypeVar("Result")


def in_touch(group: Group, work: Callable[[], Result]) -> Result:
    """What `work` returns, once that of all ranks has; all call this, and each does its own, on a thread.

    Raises:
        what `work` raises, on this rank; on the others PeerLost, once it has gone.
    """
    pool = ThreadPoolExecutor(1)
    doing = pool.submit(_as_here, group.device, torch.is_inference_mode_enabled(), work)
    pool.shutdown(wait=False)  # its thread ends with the work; a rank that fails meanwhile does not wait for it
    while group.agree(_is_underway(doing)):
        pass
    return doing.result()


def _as_here(device: torch.device, inference_mode: bool, work: Callable[[], Result]) -> Result:
    """What is the caller's thread's alone: its device and its mode."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    with torch.inference_mode(inference_mode):
        return work()


def _is_underway(doing: Future[Any]) -> bool:
    """Whether there is more to do, a moment later; raises what the work raised."""
    wait([doing], SECONDS_BETWEEN_WORDS)
    if not doing.done():
        return True
    doing.result()
    return False
