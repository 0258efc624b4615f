"""HALOS ARE EXCHANGED HERE. `start(key, value)` sends my border rows to whoever needs them; `wait()` has theirs.

    pending = exchange.start(key, value)     one message per neighbour, K and V together
    ...                                      rows that need no halo are computed meanwhile
    above, below = pending.wait()

Which rows those are says the `HaloPlan` (geometry.py). Full attention is the plan in which all rows are halos.

Shapes: B batch, R my rows, W columns, N heads, D head dim. A halo of h rows is [2, B, h, W, N, D]: keys, then values.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist

from clear_dist.comm.counters import Counters
from clear_dist.comm.group import Group, telling_lost_peers
from clear_dist.geometry import HaloPlan, Rows

Halos = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class _Incoming:
    """A message on its way in: where it lands, and its place in the halo above or below."""

    peer: int
    landing: torch.Tensor
    place: torch.Tensor


class HaloExchange:
    """The exchange of one plan, used for one layer after the other: buffers are kept as long as the shape stays."""

    def __init__(self, group: Group, plan: HaloPlan, counters: Counters) -> None:
        self._group = group
        self._plan = plan
        self._counters = counters
        self._outgoing: list[torch.Tensor] = []
        self._incoming: list[_Incoming] = []
        self._halos: Halos | None = None
        self._pending: PendingHalos | None = None

    @torch.no_grad()
    def start(self, key_BRWND: torch.Tensor, value_BRWND: torch.Tensor) -> "PendingHalos":
        """Send the rows that others need and begin to receive theirs; all ranks call this, in the same order.

        Args:
            key_BRWND: keys of this rank's rows, [B, R, W, N, D] on the group's device; need not be contiguous.
            value_BRWND: values, of the same shape and dtype.

        Raises:
            PeerLost: a neighbour went away.
        """
        assert self._pending is None, "start: the previous exchange was not waited for"
        assert key_BRWND.shape == value_BRWND.shape and key_BRWND.dtype == value_BRWND.dtype
        assert key_BRWND.shape[1] == len(self._plan.own), f"{key_BRWND.shape[1]} rows for {self._plan.own}"
        self._fit_buffers(key_BRWND)
        self._pack(key_BRWND, value_BRWND)
        self._pending = PendingHalos(self, self._post())
        return self._pending

    def _pack(self, key_BRWND: torch.Tensor, value_BRWND: torch.Tensor) -> None:
        for transfer, message in zip(self._plan.sends, self._outgoing, strict=True):
            mine = transfer.rows.relative_to(self._plan.own.start)
            message[0].copy_(key_BRWND[:, mine], non_blocking=True)
            message[1].copy_(value_BRWND[:, mine], non_blocking=True)
            self._counters.add("halo_bytes_sent", message.nbytes)
            self._counters.add("halo_messages_sent", 1)
        self._group.settle()

    def _post(self) -> list[dist.Work]:
        """Post all messages at once; returns what must be waited for, receives before sends."""
        process_group = self._group.main
        receives = [
            dist.P2POp(dist.irecv, message.landing, group=process_group, group_peer=message.peer)
            for message in self._incoming
        ]
        sends = [
            dist.P2POp(dist.isend, message, group=process_group, group_peer=transfer.peer)
            for transfer, message in zip(self._plan.sends, self._outgoing, strict=True)
        ]
        with telling_lost_peers("a neighbour"):
            return dist.batch_isend_irecv(receives + sends) if receives + sends else []

    def _finish(self, works: list[dist.Work]) -> Halos:
        """Wait for the sends too: they must be over before buffers are packed anew, and gloo drops a forgotten one.

        It costs no time: a neighbour whose message is here has posted its receives together with it.
        """
        self._pending = None
        with self._counters.waiting(self._group.wire):
            for work, peer in zip(works, self._named_peers(len(works)), strict=True):
                with telling_lost_peers(peer):
                    work.wait()
        for message in self._incoming:
            if message.landing is not message.place:
                message.place.copy_(message.landing, non_blocking=True)
        assert self._halos is not None
        return self._halos

    def _named_peers(self, works: int) -> list[str]:
        """Whom each work concerns: gloo returns one per message, NCCL a single one for all."""
        peers = [message.peer for message in self._incoming] + [transfer.peer for transfer in self._plan.sends]
        return [f"rank {self._group.ranks[peer]}" for peer in peers] if works == len(peers) else ["a neighbour"] * works

    def _fit_buffers(self, key_BRWND: torch.Tensor) -> None:
        """Make the buffers for this shape and dtype, unless they are there."""
        batch, _, *row_shape = key_BRWND.shape
        dtype, own, extended = key_BRWND.dtype, self._plan.own, self._plan.extended
        sides = Rows(extended.start, own.start), Rows(own.stop, extended.stop)
        above, below = ((2, batch, len(rows), *row_shape) for rows in sides)
        if self._halos is not None and (self._halos[0].shape, self._halos[0].dtype) == (above, dtype):
            return
        with torch.inference_mode(False):  # see Group.wire_buffer
            self._halos = (key_BRWND.new_empty(above), key_BRWND.new_empty(below))
        self._outgoing = [
            self._group.wire_buffer((2, batch, len(transfer.rows), *row_shape), dtype) for transfer in self._plan.sends
        ]
        self._incoming = []
        for transfer in self._plan.receives:
            side = int(transfer.rows.start >= own.stop)
            place = self._halos[side][:, :, transfer.rows.relative_to(sides[side].start)]
            self._incoming.append(_Incoming(transfer.peer, self._landing(place), place))

    def _landing(self, place: torch.Tensor) -> torch.Tensor:
        """The place itself if a message can arrive there: with one owner on that side and no copies to host memory."""
        if place.is_contiguous() and not self._group.copies_to_wire:
            return place
        return self._group.wire_buffer(place.shape, place.dtype)


class PendingHalos:
    """Halos on their way."""

    def __init__(self, exchange: HaloExchange, works: list[dist.Work]) -> None:
        self._exchange = exchange
        self._works = works

    @torch.no_grad()
    def wait(self) -> Halos:
        """The halos above and below my rows; to be called once.

        On NCCL the current stream waits, the host does not.

        Returns:
            Two tensors [2, B, rows, W, N, D], keys and values, rows in ascending order and of 0 rows at the border of
            the grid; they are overwritten from the next `start` on.

        Raises:
            PeerLost: a neighbour went away.
        """
        assert self._exchange._pending is self, "wait: these halos were waited for already"
        return self._exchange._finish(self._works)
