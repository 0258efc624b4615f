"""Stripes of the finished picture come to rank 0, one after the other: it never waits for more than it can use."""

from collections.abc import Iterator

import torch
import torch.distributed as dist

from clear_dist.comm.group import Group, telling_lost_peers


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
