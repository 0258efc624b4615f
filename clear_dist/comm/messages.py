"""Messages between ranks."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from clear_dist.comm.group import Group

Message = tuple[int, torch.Tensor]
"""Peer (rank within the group), and a buffer on the wire's side."""

all_gather: Callable[..., Any] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
"""Renamed in torch 2.13."""


def post(group: Group, incoming: Sequence[Message], outgoing: Sequence[Message]) -> list[dist.Work]:
    """Post all messages at once: apart, two ranks could wait for each other.

    Returns works to wait for: on gloo one per message, incoming first (it drops forgotten sends); on NCCL one in all.
    """
    # Receives come first: gloo sends and receives at the same time only if the receive was posted before.
    messages = [
        dist.P2POp(operation, buffer, group=group.main, group_peer=peer)
        for operation, listed in ((dist.irecv, incoming), (dist.isend, outgoing))
        for peer, buffer in listed
    ]
    return dist.batch_isend_irecv(messages) if messages else []


def pack(group: Group, tensors: Sequence[torch.Tensor], message: torch.Tensor) -> None:
    """Copy tensors [B, L, ...] into `message` [L, len(tensors), B, ...] on the wire's side; one launch on a GPU.

    L comes first, so that any run of it is contiguous: one packed message serves several ranks, and theirs arrive in
    one buffer. `settle` comes after.
    """
    # Few dimensions, or `torch.stack` would copy tensor by tensor.
    along_L, flat = [x.transpose(0, 1).flatten(2) for x in tensors], message.flatten(3)
    if group.copies_to_wire:
        flat.copy_(torch.stack(along_L, dim=1), non_blocking=True)
    else:
        torch.stack(along_L, dim=1, out=flat)
