"""HALOS ARE EXCHANGED HERE. `start(key, value)` sends my border rows to whoever needs them; `wait()` has theirs.

    pending = exchange.start(key, value)     one message per neighbour, K and V together
    ...                                      meanwhile my rows attend to my keys
    above, below = pending.wait()
    ...                                      and then to these
    pending.release()

The `HaloPlan` (geometry.py) says which rows those are; in full attention all. Both may raise PeerLost.

Shapes: B batch, R my rows, W columns, N heads, D head dim. A halo of h rows is [2, B, h, W, N, D]: keys, then values.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import InitVar, dataclass
from typing import Literal

import torch
import torch.distributed as dist

from clear_dist.comm.counters import Counters, labelled
from clear_dist.comm.group import Group, telling_lost_peers
from clear_dist.comm.messages import post
from clear_dist.geometry import HaloPlan

Halos = tuple[torch.Tensor, torch.Tensor]
"""Above and below my rows."""
Named = tuple[str, dist.Work]
"""Peer, for errors, and its message."""


@dataclass(eq=False)
class HaloExchange:
    """Exchange of one plan, used for one layer after the other; buffers are kept as long as the shape stays."""

    _group: Group
    _plan: HaloPlan
    _counters: Counters
    sends: "InitVar[SendBuffers | None]" = None
    counted_as: Literal["halo", "pooled"] = "halo"

    def __post_init__(self, sends: "SendBuffers | None") -> None:
        self._sends = sends or SendBuffers(self._group, self._counters, layers=0)
        self._received: list[torch.Tensor] = []
        self._arriving: list[Named] = []
        self._pending: PendingHalos | None = None

    @torch.no_grad()
    def start(self, key_BRWND: torch.Tensor, value_BRWND: torch.Tensor) -> "PendingHalos":
        """Begin to exchange keys and values (contiguous or not) of my rows; all ranks call this, in the same order."""
        assert self._pending is None, "start: the previous exchange was not waited for"
        assert key_BRWND.shape == value_BRWND.shape and key_BRWND.dtype == value_BRWND.dtype
        assert key_BRWND.shape[1] == len(self._plan.own), f"{key_BRWND.shape[1]} rows for {self._plan.own}"
        self._pending = self._begin(key_BRWND, value_BRWND)
        return self._pending

    def drain(self) -> None:
        """Wait for all messages, before buffers are dropped or after a forward that was broken off."""
        self._wait_for_arrivals()
        self._sends.drain()

    @property
    def lags(self) -> bool:
        """Whether the next `start` posts nothing yet, and has the halos of the step before."""
        return False

    @property
    def received_bytes(self) -> int:
        return sum(buffer.nbytes for buffer in self._received)

    def _begin(self, key_BRWND: torch.Tensor, value_BRWND: torch.Tensor) -> "PendingHalos":
        self._post(key_BRWND, value_BRWND)
        return PendingHalos(self)

    @labelled("comm: halos start")
    def _post(self, key_BRWND: torch.Tensor, value_BRWND: torch.Tensor) -> None:
        batch, _, *row_shape = key_BRWND.shape
        self._no_rows = key_BRWND.new_empty((2, batch, 0, *row_shape))
        before: Sequence[torch.Tensor | None] = self._received or [None] * len(self._plan.receives)
        self._received = [
            self._group.wire_buffer((2, batch, len(transfer.rows), *row_shape), key_BRWND.dtype, reuse=old)
            for transfer, old in zip(self._plan.receives, before, strict=True)
        ]
        sends = self._packed(key_BRWND, value_BRWND)
        incoming = [(move.peer, buffer) for move, buffer in zip(self._plan.receives, self._received, strict=True)]
        outgoing = [(move.peer, buffer) for move, buffer in zip(self._plan.sends, sends, strict=True)]
        with telling_lost_peers("a neighbour"):
            works = post(self._group, incoming, outgoing)
        peers = [peer for peer, _ in (*incoming, *outgoing)]
        if len(works) == len(peers):
            named = [(f"rank {self._group.ranks[peer]}", work) for peer, work in zip(peers, works, strict=True)]
            self._arriving, leaving = named[: len(self._received)], named[len(self._received) :]
        else:  # NCCL: one for all of them
            self._arriving = leaving = [("a neighbour", work) for work in works]
        self._sends.posted(sends, leaving)

    def _packed(self, key_BRWND: torch.Tensor, value_BRWND: torch.Tensor) -> list[torch.Tensor]:
        mine = [transfer.rows.relative_to(self._plan.own.start) for transfer in self._plan.sends]
        shapes = [(2, *key_BRWND[:, rows].shape) for rows in mine]
        messages = self._sends.take(shapes, key_BRWND.dtype)
        for rows, message in zip(mine, messages, strict=True):
            message[0].copy_(key_BRWND[:, rows], non_blocking=True)
            message[1].copy_(value_BRWND[:, rows], non_blocking=True)
            self._counters.add(f"{self.counted_as}_bytes_sent", message.nbytes)
            self._counters.add(f"{self.counted_as}_messages_sent", 1)
        self._group.settle()
        return messages

    def _wait_for_arrivals(self) -> None:
        works, self._arriving = self._arriving, []
        _wait_for("comm: halos wait", works, self._group, self._counters)

    def _finish(self) -> Halos:
        """Halos on my device; where a side has one owner and no copy is needed, the buffer itself."""
        self._pending = None
        self._wait_for_arrivals()
        # It costs no time: a neighbour whose message is here has posted its receives together with it.
        self._sends.limit()
        sides: Sequence[list[torch.Tensor]] = ([], [])
        for transfer, buffer in zip(self._plan.receives, self._received, strict=True):
            side = sides[transfer.rows.start >= self._plan.own.stop]
            side.append(buffer.to(self._group.device, non_blocking=True))
        above, below = (side[0] if len(side) == 1 else torch.cat([self._no_rows, *side], dim=2) for side in sides)
        return above, below


@dataclass(eq=False)
class PendingHalos:
    _exchange: HaloExchange
    lag: bool = False
    """Whether they are from the previous step."""
    on_release: Callable[[], None] | None = None

    @torch.no_grad()
    def wait(self) -> Halos:
        """Halos above and below my rows, [2, B, rows, W, N, D] each, rows ascending; call once, read until `release`.

        On NCCL the current stream waits, the host does not. At the border of the grid there are 0 rows.
        """
        assert self._exchange._pending is self, "wait: these halos were waited for already"
        return self._exchange._finish()

    @torch.no_grad()
    def release(self) -> None:
        """Let the next halos arrive in the place of these."""
        if self.on_release is not None:
            self.on_release()


class SendBuffers:
    """Messages on their way out; `limit` leaves those of the last `layers` layers there."""

    def __init__(self, group: Group, counters: Counters, *, layers: int) -> None:
        self._group = group
        self._counters = counters
        self._layers = layers
        self._leaving: deque[tuple[list[torch.Tensor], list[Named]]] = deque()
        self._free: list[list[torch.Tensor]] = []

    def take(self, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype) -> list[torch.Tensor]:
        """Buffers for a layer's messages, to be handed to `posted`; the same number each time."""
        before = self._free.pop() if self._free else [None] * len(shapes)
        return [self._group.wire_buffer(shape, dtype, reuse=old) for shape, old in zip(shapes, before, strict=True)]

    def posted(self, buffers: list[torch.Tensor], works: list[Named]) -> None:
        self._leaving.append((buffers, works))

    def limit(self) -> None:
        while len(self._leaving) > self._layers:
            self._wait_for_oldest()

    def drain(self) -> None:
        """Wait for all messages and drop the buffers."""
        while self._leaving:
            self._wait_for_oldest()
        self._free.clear()

    def _wait_for_oldest(self) -> None:
        buffers, works = self._leaving.popleft()
        _wait_for("comm: sends wait", works, self._group, self._counters)
        self._free.append(buffers)


def _wait_for(label: str, works: Sequence[Named], group: Group, counters: Counters) -> None:
    if works:
        with counters.waiting(label, group.wire):
            for peer, work in works:
                with telling_lost_peers(peer):
                    work.wait()
