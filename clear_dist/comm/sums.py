"""Sums over ranks that all decide by."""

import math

import torch
import torch.distributed as dist
from torch import Tensor

from clear_dist.comm.counters import Counters
from clear_dist.comm.group import Group, telling_lost_peers


@torch.no_grad()
def summed(values: Tensor, group: Group, counters: Counters) -> list[float]:
    """Sums over ranks of a few `values` [K], equal on all ranks, which all call this; the host waits for them.

    NaN where tensors have no values. Raises PeerLost where a rank went away.
    """
    if values.is_meta:
        return [math.nan] * len(values)
    carried = group.wire_buffer(values.shape, torch.float64)
    carried.copy_(values)
    counters.add("other_bytes", carried.nbytes)
    with counters.waiting("comm: cache", group.wire), telling_lost_peers():
        # Not on the halos' communicator, behind those that are in flight in the stale schedule.
        dist.all_reduce(carried, group=group.text)
    return carried.tolist()
