"""Rows of a picture change hands: from the ranks that have them to those that need them next.

Shapes: B batch, C channels, R my rows, W columns.
"""

import torch

from clear_dist.comm.counters import Counters
from clear_dist.comm.group import Group, telling_lost_peers
from clear_dist.comm.messages import post
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
