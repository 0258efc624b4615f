"""Messages on their way out: kept until they were waited for (gloo drops a forgotten one), and only then reused."""

from collections import deque
from collections.abc import Sequence

import torch
import torch.distributed as dist

from clear_dist.comm.counters import Counters
from clear_dist.comm.group import Group, telling_lost_peers

Named = tuple[str, dist.Work]
"""Whom a message goes to or comes from, for errors, and what to wait for."""


class SendBuffers:
    """The messages of the last few layers."""

    def __init__(self, group: Group, counters: Counters, *, layers: int) -> None:
        """
        Args:
            layers: how many layers' messages `limit` leaves on their way.
        """
        self._group = group
        self._counters = counters
        self._layers = layers
        self._leaving: deque[tuple[list[torch.Tensor], list[Named]]] = deque()
        self._free: list[list[torch.Tensor]] = []

    def take(self, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype) -> list[torch.Tensor]:
        """Buffers for a layer's messages, to be packed, posted, and handed to `posted`; as many each time."""
        before = self._free.pop() if self._free else [None] * len(shapes)
        return [self._group.wire_buffer(shape, dtype, reuse=old) for shape, old in zip(shapes, before, strict=True)]

    def posted(self, buffers: list[torch.Tensor], works: list[Named]) -> None:
        self._leaving.append((buffers, works))

    def limit(self) -> None:
        """Wait for the oldest until no more than `layers` are on their way."""
        while len(self._leaving) > self._layers:
            self._wait_for_oldest()

    def drain(self) -> None:
        """Wait for all of them, and keep no buffer."""
        while self._leaving:
            self._wait_for_oldest()
        self._free.clear()

    def _wait_for_oldest(self) -> None:
        buffers, works = self._leaving.popleft()
        wait_for("comm: sends wait", works, self._group, self._counters)
        self._free.append(buffers)


def wait_for(label: str, works: Sequence[Named], group: Group, counters: Counters) -> None:
    """Wait for messages; on NCCL the current stream waits, the host does not."""
    if not works:
        return
    with counters.waiting(label, group.wire):
        for who, work in works:
            with telling_lost_peers(who):
                work.wait()
