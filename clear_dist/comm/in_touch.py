"""Work that may take longer than the group's timeout."""

from collections.abc import Callable
from concurrent.futures import wait
from typing import TypeVar

import torch

from clear_dist.comm.group import Group
from clear_dist.launch.aside import in_background

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
