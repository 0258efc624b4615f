"""Bytes that one rank tells the others: text or numbers from outside, which are not to be unpickled."""

import torch
import torch.distributed as dist

from clear_dist.comm.group import Group, telling_lost_peers


def broadcast_bytes(group: Group, word: bytes = b"", source: int = 0) -> bytes:
    """`word` of rank `source` on all ranks; others' are ignored. Through gloo, whatever the device."""
    length = torch.tensor([len(word)])
    with telling_lost_peers():
        dist.broadcast(length, group.ranks[source], group=group.main)
        if not length:
            return b""
        held = bytearray(word) if group.rank == source else bytearray(int(length))
        dist.broadcast(torch.frombuffer(held, dtype=torch.uint8), group.ranks[source], group=group.main)
    return bytes(held)
