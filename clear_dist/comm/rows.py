"""Rows of a picture between ranks, in four ways; all raise PeerLost where a rank went away.

    StripeJoin.join        all stripes of tokens to all ranks, once a step
    move_rows              rows from the ranks that have them to those that need them next
    fill_halos             one border row from each neighbour, before a convolution
    collect_stripes        all stripes to rank 0, one at a time

Shapes: B batch, C channels, H rows, R my rows, E = R + 2 with a halo row on each side, W columns.
"""

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from clear_dist.comm.counters import Counters
from clear_dist.comm.group import Group, telling_lost_peers
from clear_dist.comm.messages import all_gather, post
from clear_dist.geometry import Rows, plan_moves

Peers = list[tuple[int, Tensor]]
"""Tensors on the group's device, each with the rank within the group that it goes to or comes from."""


class StripeJoin:
    """Join of token stripes into the whole grid, on all ranks; its buffers are kept as long as the shape stays."""

    def __init__(self, group: Group, stripes: tuple[Rows, ...], counters: Counters) -> None:
        """With several ranks to a stripe, each run of ranks that holds all stripes has pictures of its own."""
        assert not group.size % len(stripes), f"{len(stripes)} stripes for {group.size} ranks"
        self._group = group
        self._stripes = stripes
        self._counters = counters
        self._mine: Tensor | None = None
        self._all: Tensor | None = None

    @torch.no_grad()
    def join(self, local: Tensor) -> Tensor:
        """New tensor [B, H*W, C], equal on all ranks, from all [B, R*W, C] in raster order; all ranks call this.

        B is that of each run of ranks, and in the result that of all together.
        """
        group, heights = self._group, [len(stripe) for stripe in self._stripes]
        batch, tokens, channels = local.shape
        own = heights[group.rank % len(heights)]
        columns, rest = divmod(tokens, own)
        assert not rest, f"{tokens} tokens for {own} rows"
        # All messages must be of one length: shorter stripes are padded, by one unit at most, and cut again below.
        shape = (batch, max(heights) * columns, channels)
        self._mine = group.wire_buffer(shape, local.dtype, reuse=self._mine)
        self._all = group.wire_buffer((group.size, *shape), local.dtype, reuse=self._all)
        self._mine[:, :tokens].copy_(local, non_blocking=True)
        group.settle()
        self._counters.add("join_bytes", self._mine.nbytes)
        with self._counters.waiting("comm: join", group.wire), telling_lost_peers():
            # Not on the halos' communicator, behind those that are in flight in the stale schedule.
            all_gather(self._all.flatten(0, 1), self._mine, group=group.text)
        received = self._all.unflatten(0, (-1, len(heights)))
        stripes = [received[:, rank, :, : rows * columns] for rank, rows in enumerate(heights)]
        return torch.cat(stripes, dim=2).flatten(0, 1).to(group.device)


@torch.no_grad()
def move_rows(
    local_BCRW: Tensor | None,
    group: Group,
    have: tuple[Rows, ...],
    want: tuple[Rows, ...],
    *,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    counters: Counters,
) -> Tensor:
    """New tensor [B, C, len(want[rank]), W] of the rows that this rank wants; all ranks call this.

    Args:
        local_BCRW: rows have[rank], on the group's device; None on ranks with none.
        have: disjoint, possibly empty.
        want: may overlap; some rank has each of the rows.
        shape: B, C and W, which ranks without rows could not know.
    """
    batch, channels, width = shape
    mine, wanted = have[group.rank], want[group.rank]
    if local_BCRW is None:
        local_BCRW = torch.empty((batch, channels, 0, width), dtype=dtype, device=group.device)
    found = (tuple(local_BCRW.shape), local_BCRW.dtype)
    assert found == ((batch, channels, len(mine), width), dtype), f"{found} for {len(mine)} rows of {shape}, {dtype}"
    plan = plan_moves(have, want, group.rank)
    moved_BCRW = torch.empty((batch, channels, len(wanted), width), dtype=dtype, device=group.device)
    moved_BCRW[:, :, plan.kept.relative_to(wanted.start)] = local_BCRW[:, :, plan.kept.relative_to(mine.start)]
    sent = [(move.peer, local_BCRW[:, :, move.rows.relative_to(mine.start)]) for move in plan.sends]
    received = [(move.peer, moved_BCRW[:, :, move.rows.relative_to(wanted.start)]) for move in plan.receives]
    _exchange(sent, received, group, counters, "comm: rows move", "another rank")
    return moved_BCRW


@torch.no_grad()
def fill_halos(stripe_BCEW: Tensor, group: Group, counters: Counters) -> None:
    """Fill first and last row with the neighbours' rows, if any; all ranks call this, in the same order.

    Stripes lie on the ranks in ascending order of rows.
    """
    # For the neighbour above and the one below: the row that it is sent, and the row that its own goes to.
    sides = ((group.rank - 1, 1, 0), (group.rank + 1, -2, -1))
    neighbours = [side for side in sides if 0 <= side[0] < group.size]
    sent = [(peer, stripe_BCEW[:, :, mine]) for peer, mine, _ in neighbours]
    received = [(peer, stripe_BCEW[:, :, place]) for peer, _, place in neighbours]
    _exchange(sent, received, group, counters, "comm: border rows", "a neighbour")


def _exchange(sent: Peers, received: Peers, group: Group, counters: Counters, label: str, who: str) -> None:
    """Send tensors to peers, and copy into others what peers send; none need be contiguous."""
    incoming, outgoing = (
        [(peer, group.wire_buffer(x.shape, x.dtype)) for peer, x in listed] for listed in (received, sent)
    )
    for (_, message), (_, x) in zip(outgoing, sent, strict=True):
        message.copy_(x, non_blocking=True)
        counters.add("other_bytes", message.nbytes)
    group.settle()
    with counters.waiting(label, group.wire), telling_lost_peers(who):
        for work in post(group, incoming, outgoing):
            work.wait()
    for (_, message), (_, x) in zip(incoming, received, strict=True):
        x.copy_(message)


def collect_stripes(local: Tensor, group: Group, heights: tuple[int, ...]) -> Iterator[Tensor]:
    """Stripes of all ranks on the CPU of rank 0, from the top, and none elsewhere; all ranks exhaust the iterator.

    `local` ([rows, ...] on the group's device) may differ among ranks in `rows` only; a height of 0 means no stripe.
    """
    assert len(local) == heights[group.rank], f"{len(local)} rows for {heights[group.rank]}"
    if len(local) and group.rank == 0:
        yield local.cpu()
    elif len(local):
        # From CPU to CPU, by gloo: NCCL would connect each pair of ranks anew, when memory is fullest.
        with telling_lost_peers("rank 0"):
            dist.send(local.cpu().contiguous(), group=group.main, group_dst=0)
    for peer, rows in enumerate(heights):
        if group.rank == 0 and peer != 0 and rows:
            carried = torch.empty((rows, *local.shape[1:]), dtype=local.dtype)
            with telling_lost_peers(f"rank {group.ranks[peer]}"):
                dist.recv(carried, group=group.main, group_src=peer)
            yield carried
            del carried  # before the next one comes
