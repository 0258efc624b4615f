"""Rows of a picture change hands: from the ranks that have them to those that need them next.

Shapes: B batch, C channels, R my rows, W columns.
"""

from collections.abc import Iterator

import torch
import torch.distributed as dist

from clear_dist.comm.counters import Counters
from clear_dist.comm.group import Group, telling_lost_peers
from clear_dist.comm.messages import Message, post
from clear_dist.geometry import Rows, plan_moves


@torch.no_grad()
def move_rows(
    local_BCRW: torch.Tensor | None,
    group: Group,
    have: tuple[Rows, ...],
    want: tuple[Rows, ...],
    *,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    counters: Counters,
) -> torch.Tensor:
    """The rows that this rank wants, of those that the ranks have; all ranks call this.

    Args:
        local_BCRW: the rows have[rank], on the group's device; None where there are none.
        have: each rank's rows, disjoint; none on ranks that have nothing.
        want: the rows that each rank needs, which may overlap; every one of them is had by some rank.
        shape: B, C and W, which ranks with nothing could not know.

    Returns:
        A new tensor [B, C, len(want[rank]), W] on the group's device.

    Raises:
        PeerLost: a rank went away.
    """
    batch, channels, width = shape
    mine, wanted = have[group.rank], want[group.rank]
    if local_BCRW is None:
        local_BCRW = torch.empty((batch, channels, 0, width), dtype=dtype, device=group.device)
    found = (tuple(local_BCRW.shape), local_BCRW.dtype)
    assert found == ((batch, channels, len(mine), width), dtype), f"{found} for {len(mine)} rows of {shape}, {dtype}"
    plan = plan_moves(have, want, group.rank)
    incoming = [group.wire_buffer((batch, channels, len(move.rows), width), dtype) for move in plan.receives]
    outgoing = [group.wire_buffer((batch, channels, len(move.rows), width), dtype) for move in plan.sends]
    for message, move in zip(outgoing, plan.sends, strict=True):
        message.copy_(local_BCRW[:, :, move.rows.relative_to(mine.start)], non_blocking=True)
        counters.add("other_bytes", message.nbytes)
    group.settle()
    with counters.waiting("comm: rows move", group.wire), telling_lost_peers():
        for work in post(
            group,
            [(move.peer, message) for move, message in zip(plan.receives, incoming, strict=True)],
            [(move.peer, message) for move, message in zip(plan.sends, outgoing, strict=True)],
        ):
            work.wait()
    moved_BCRW = torch.empty((batch, channels, len(wanted), width), dtype=dtype, device=group.device)
    moved_BCRW[:, :, plan.kept.relative_to(wanted.start)] = local_BCRW[:, :, plan.kept.relative_to(mine.start)]
    for message, move in zip(incoming, plan.receives, strict=True):
        moved_BCRW[:, :, move.rows.relative_to(wanted.start)].copy_(message)
    return moved_BCRW


ABOVE, BELOW = (1, 0), (-2, -1)
"""For the neighbour on that side: the row that it is sent, and the row that its own goes to."""


class RowHalos:
    """The exchange of border rows between stripes that lie on the ranks in ascending order of rows."""

    def __init__(self, group: Group, counters: Counters) -> None:
        self._group = group
        self._counters = counters
        sides = ((group.rank - 1, ABOVE), (group.rank + 1, BELOW))
        self._neighbours = [(peer, *rows) for peer, rows in sides if 0 <= peer < group.size]

    @torch.no_grad()
    def fill(self, stripe_BCEW: torch.Tensor) -> None:
        """Fill the first and the last row with the neighbours' rows; all ranks call this, in the same order.

        Args:
            stripe_BCEW: on the group's device, at least one row besides the halos. A halo beyond the border of the
                picture is left as it is.

        Raises:
            PeerLost: a neighbour went away.
        """
        group = self._group
        shape = stripe_BCEW[:, :, 0].shape
        incoming = [group.wire_buffer(shape, stripe_BCEW.dtype) for _ in self._neighbours]
        outgoing = [group.wire_buffer(shape, stripe_BCEW.dtype) for _ in self._neighbours]
        for message, (_, mine, _) in zip(outgoing, self._neighbours, strict=True):
            message.copy_(stripe_BCEW[:, :, mine], non_blocking=True)
            self._counters.add("other_bytes", message.nbytes)
        group.settle()
        with self._counters.waiting("comm: border rows", group.wire), telling_lost_peers("a neighbour"):
            for work in post(group, self._addressed(incoming), self._addressed(outgoing)):
                work.wait()
        for message, (_, _, place) in zip(incoming, self._neighbours, strict=True):
            stripe_BCEW[:, :, place].copy_(message)

    def _addressed(self, buffers: list[torch.Tensor]) -> list[Message]:
        return [(peer, buffer) for (peer, _, _), buffer in zip(self._neighbours, buffers, strict=True)]


class StripeJoin:
    """Joins stripes of tokens into the whole grid, on all ranks; its buffers are kept as long as the shape stays."""

    def __init__(self, group: Group, stripes: tuple[Rows, ...], counters: Counters) -> None:
        assert len(stripes) == group.size, f"{len(stripes)} stripes for {group.size} ranks"
        self._group = group
        self._stripes = stripes
        self._counters = counters
        self._mine: torch.Tensor | None = None
        self._all: torch.Tensor | None = None

    @torch.no_grad()
    def join(self, local: torch.Tensor) -> torch.Tensor:
        """All stripes, in order; all ranks call this.

        Args:
            local: this rank's tokens in raster order, [B, R*W, C] on the group's device.

        Returns:
            A new tensor [B, H*W, C], equal on all ranks.

        Raises:
            PeerLost: a rank went away.
        """
        group, heights = self._group, [len(stripe) for stripe in self._stripes]
        batch, tokens, channels = local.shape
        columns, rest = divmod(tokens, heights[group.rank])
        assert not rest, f"{tokens} tokens for {heights[group.rank]} rows"
        # All messages must be of one length: shorter stripes are padded, by one unit at most, and cut again below.
        shape = (batch, max(heights) * columns, channels)
        self._mine = group.wire_buffer(shape, local.dtype, reuse=self._mine)
        self._all = group.wire_buffer((group.size, *shape), local.dtype, reuse=self._all)
        self._mine[:, :tokens].copy_(local, non_blocking=True)
        group.settle()
        self._counters.add("join_bytes", self._mine.nbytes)
        with self._counters.waiting("comm: join", group.wire), telling_lost_peers():
            dist.all_gather(list(self._all.unbind()), self._mine, group=group.main)
        whole = torch.cat([self._all[rank, :, : rows * columns] for rank, rows in enumerate(heights)], dim=1)
        return whole.to(group.device)


def collect_stripes(local: torch.Tensor, group: Group, heights: tuple[int, ...]) -> Iterator[torch.Tensor]:
    """On rank 0 the stripes of all ranks that have one, from the top, on the CPU; on the others nothing.

    All ranks exhaust the iterator.

    Args:
        local: this rank's stripe [rows, ...] on the group's device; equal on all ranks but for the number of rows.
        heights: each rank's rows, 0 where there is no stripe.

    Raises:
        PeerLost: a rank went away.
    """
    assert len(local) == heights[group.rank], f"{len(local)} rows for {heights[group.rank]}"
    if group.rank == 0:
        if len(local):
            yield local.cpu()
        yield from _receive(local, group, heights)
    elif len(local):
        carried = group.wire_buffer(local.shape, local.dtype)
        carried.copy_(local)
        with telling_lost_peers("rank 0"):
            dist.send(carried, group=group.main, group_dst=0)


def _receive(local: torch.Tensor, group: Group, heights: tuple[int, ...]) -> Iterator[torch.Tensor]:
    """The other ranks' stripes, of the kind of `local`."""
    for peer, rows in enumerate(heights):
        if peer == group.rank or not rows:
            continue
        carried = group.wire_buffer((rows, *local.shape[1:]), local.dtype)
        with telling_lost_peers(f"rank {group.ranks[peer]}"):
            dist.recv(carried, group=group.main, group_src=peer)
        yield carried.cpu()
