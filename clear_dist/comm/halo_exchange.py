"""HALOS ARE EXCHANGED HERE. `start(key, value)` sends my border rows to whoever needs them; `wait()` has theirs.

    pending = exchange.start(key, value)     one message to each neighbour, K and V together
    ...                                      meanwhile my rows attend to my keys
    above, below = pending.wait()
    ...                                      and then to these
    pending.release()

The `HaloPlan` (geometry.py) says which rows those are; in full attention all. Both may raise PeerLost.

Shapes: B batch, R my rows, W columns, N heads, D head dim. A halo of h rows is [2, B, h, W, N, D], keys, then values: a
view of a buffer with rows first, so that what each owner sends arrives in its place.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import InitVar, dataclass
from typing import Literal

import torch
import torch.distributed as dist

from clear_dist.comm.counters import Counters, labelled
from clear_dist.comm.group import Group, telling_lost_peers
from clear_dist.comm.messages import Message, pack, post
from clear_dist.geometry import HaloPlan, Rows, Transfer

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
    def batch(self) -> int | None:
        """Pictures of the halos that are here or on their way; None before the first."""
        return self._received[0].shape[2] if self._received else None

    @property
    def received_bytes(self) -> int:
        return sum(buffer.nbytes for buffer in self._received)

    def _begin(self, key_BRWND: torch.Tensor, value_BRWND: torch.Tensor) -> "PendingHalos":
        self._post(key_BRWND, value_BRWND)
        return PendingHalos(self)

    @labelled("comm: halos start")
    def _post(self, key_BRWND: torch.Tensor, value_BRWND: torch.Tensor) -> None:
        batch, _, *row_shape = key_BRWND.shape
        self._received = [
            self._group.wire_buffer((len(side), 2, batch, *row_shape), key_BRWND.dtype, reuse=old)
            for side, old in zip(self._plan.halos, self._received or (None, None), strict=True)
        ]
        borders = self._packed(key_BRWND, value_BRWND)
        incoming = _messages(self._plan.receives, self._plan.halos, self._received)
        outgoing = _messages(self._plan.sends, self._plan.borders, borders)
        for _, message in outgoing:
            self._counters.add(f"{self.counted_as}_bytes_sent", message.nbytes)
            self._counters.add(f"{self.counted_as}_messages_sent", 1)
        with telling_lost_peers("a neighbour"):
            works = post(self._group, incoming, outgoing)
        peers = [peer for peer, _ in (*incoming, *outgoing)]
        if len(works) == len(peers):
            named = [(f"rank {self._group.ranks[peer]}", work) for peer, work in zip(peers, works, strict=True)]
            self._arriving, leaving = named[: len(incoming)], named[len(incoming) :]
        else:  # NCCL: one for all of them
            self._arriving = leaving = [("a neighbour", work) for work in works]
        self._sends.posted(borders, leaving)

    def _packed(self, key_BRWND: torch.Tensor, value_BRWND: torch.Tensor) -> list[torch.Tensor]:
        """My border rows [rows, 2, B, W, N, D], of which each message is a run."""
        batch, _, *row_shape = key_BRWND.shape
        runs = self._plan.borders
        borders = self._sends.take([(len(run), 2, batch, *row_shape) for run in runs], key_BRWND.dtype)
        for run, border in zip(runs, borders, strict=True):
            mine = run.relative_to(self._plan.own.start)
            pack(self._group, (key_BRWND[:, mine], value_BRWND[:, mine]), border)
        self._group.settle()
        return borders

    def _wait_for_arrivals(self) -> None:
        works, self._arriving = self._arriving, []
        _wait_for("comm: halos wait", works, self._group, self._counters)

    def _finish(self) -> Halos:
        """Halos on my device: where no copy is needed, the buffers themselves."""
        self._pending = None
        self._wait_for_arrivals()
        # It costs no time: a neighbour whose message is here has posted its receives together with it.
        self._sends.limit()
        above, below = (side.to(self._group.device, non_blocking=True).movedim(0, 2) for side in self._received)
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


def _messages(moves: Sequence[Transfer], runs: Sequence[Rows], buffers: Sequence[torch.Tensor]) -> list[Message]:
    """Each move's rows in the buffer of the run that holds them."""
    held = list(zip(runs, buffers, strict=True))
    places = (next((run, x) for run, x in held if len(run.intersect(move.rows))) for move in moves)
    return [(move.peer, x[move.rows.relative_to(run.start)]) for move, (run, x) in zip(moves, places, strict=True)]


def _wait_for(label: str, works: Sequence[Named], group: Group, counters: Counters) -> None:
    if works:
        with counters.waiting(label, group.wire):
            for peer, work in works:
                with telling_lost_peers(peer):
                    work.wait()
