"""Memory of the stale schedule's buffers, checked by all ranks before any is made."""

import socket

import torch

from clear_dist.comm.group import Group
from clear_dist.geometry import HaloPlan
from clear_dist.observe.memory import free_bytes
from clear_dist.options import Refusal

SENDING_LAYERS = 8
"""Layers whose messages may be in flight: a link's latency, in layers. 1, 8 and all are equally fast on gloo."""


def halo_bytes_kept(plan: HaloPlan, *, row_bytes: int, layers: int) -> int:
    """Bytes of halos kept between steps, for `layers` in all passes, with `row_bytes` of keys and values per row."""
    return layers * row_bytes * (len(plan.extended) - len(plan.own))


def halo_bytes_in_flight(plan: HaloPlan, *, row_bytes: int) -> int:
    """Bytes of outgoing messages, and of the layer that is packed meanwhile."""
    return (SENDING_LAYERS + 1) * row_bytes * sum(len(transfer.rows) for transfer in plan.sends)


def needed_bytes(plan: HaloPlan, *, row_bytes: int, layers: int) -> int:
    return halo_bytes_kept(plan, row_bytes=row_bytes, layers=layers) + halo_bytes_in_flight(plan, row_bytes=row_bytes)


def require_room(needed: int, group: Group) -> None:
    """All ranks call this; raises Refusal on all where those on one device need more bytes than it has free."""
    everyone = group.gather_objects((_place(group.wire), needed, _free_bytes(group.wire)))
    for place in {where for where, _, _ in everyone}:
        together = sum(bytes_needed for where, bytes_needed, _ in everyone if where == place)
        free = min(bytes_free for where, _, bytes_free in everyone if where == place)
        if together > free:
            raise Refusal(
                f"the stale schedule's buffers must fit in the {_shown(free)} free on {place}, "
                f"got {_shown(together)}; nearest: the sync schedule"
            )


def _place(device: torch.device) -> str:
    host = socket.gethostname()
    if device.type == "cuda":
        return f"{host}'s GPU {torch.cuda.get_device_properties(device).uuid}"
    return host


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        held_by_torch = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + held_by_torch
    return free_bytes()


def _shown(amount: int) -> str:
    return f"{amount / 1e9:.1f} GB" if amount >= 1e8 else f"{amount / 1e6:.2f} MB"
