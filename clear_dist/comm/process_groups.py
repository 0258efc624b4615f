"""torch.distributed's process groups: how ranks meet, and how their tensors travel."""

import atexit
import os
import socket
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
import torch.testing._internal.distributed.fake_pg  # registers the backend ALONE

from clear_dist.comm.meeting import INTERFACES, meet, require_interfaces
from clear_dist.launch import env
from clear_dist.options import Refusal

Transport = Literal["nccl", "gloo", "host"]
ALONE = "fake"
"""torch's backend that sends nothing, for one rank, where all that it computes is right."""


def with_index(device: torch.device) -> torch.device:
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device(device.type) if device.type == "cpu" else device


def device_of(kind: str, local_rank: int) -> torch.device:
    """Device of a rank; raises a Refusal where torch cannot use any GPU, or has no kernels for this one."""
    if kind != "cuda":
        return torch.device(kind)
    try:
        torch.cuda.init()
    except (AssertionError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise Refusal(f"--device cuda needs GPUs that torch can use, got: {reason}; nearest: --device cpu") from error
    device = torch.device("cuda", local_rank % torch.cuda.device_count())
    major, minor = torch.cuda.get_device_capability(device)
    built = torch.cuda.get_arch_list()
    if not _has_kernels(built, 10 * major + minor):
        raise Refusal(
            f"torch {torch.__version__} needs GPUs that it has kernels for ({' '.join(built)}), got compute capability "
            f"{major}.{minor}; nearest: torch for another CUDA from the index that pytorch.org/get-started names"
        )
    return device


def _has_kernels(built: Sequence[str], capability: int) -> bool:
    """Whether an architecture of torch's list runs on a GPU; sm_86 on 8.x from 8.6, compute_86 on all from 8.6."""
    parts = [name.partition("_") for name in built if name.startswith(("sm_", "compute_"))]
    known = [(kind, int(number.rstrip("af"))) for kind, _, number in parts]
    fits = (kind == "compute" or number // 10 == capability // 10 for kind, number in known if number <= capability)
    return not known or any(fits)


def check_transport(device: torch.device, transport: str) -> None:
    """Raises ValueError: gloo cannot send CUDA tensors, NCCL cannot send CPU tensors."""
    allowed = ("auto", "nccl", "host") if device.type == "cuda" else ("auto", "gloo", "host")
    if transport not in allowed:
        raise ValueError(
            f"the transport of {device} must be one of {', '.join(allowed)}, got {transport}; nearest: auto"
        )


def backends(device: torch.device) -> str:
    """Backends by device; CPU tensors (objects, decisions) always go through gloo, and unused NCCL never connects."""
    return "cpu:gloo,cuda:nccl" if device.type == "cuda" and dist.is_nccl_available() else "gloo"


def initialise_torch(device: torch.device, timeout: timedelta, join_seconds: float) -> None:
    """Make the default group of the launcher's ranks, or of this process alone, which needs no network.

    Raises ConnectionError where they do not meet within `join_seconds`, a Refusal for a network that is not here.
    """
    place = env.read()
    if place.meeting is None or place.world_size == 1:
        dist.init_process_group(ALONE, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
        return
    require_interfaces()
    try:
        store, size = meet(place, join_seconds), place.world_size
        dist.init_process_group(backends(device), store=store, rank=place.rank, world_size=size, timeout=timeout)
    except (OSError, RuntimeError) as error:
        where = ":".join(map(str, place.meeting))
        hint = f"; {INTERFACES} names the interface to use" if "gloo/" in str(error) else ""
        raise ConnectionError(f"cannot meet the other ranks at {where}: {error}".splitlines()[0] + hint) from error
    atexit.register(_leave_torch)


def _leave_torch() -> None:
    """Destroy the default group when the process ends, else NCCL complains; after a failure it would wait."""
    if dist.is_initialized() and len(dist.distributed_c10d._world.pg_map) == 1:
        dist.destroy_process_group()


def new_process_group(
    parts: Sequence[tuple[int, ...]], backend: str, timeout: timedelta, *, urgent: bool = False
) -> dist.ProcessGroup:
    """Group of the part (global ranks) that holds this process; all ranks of all parts call this, no others.

    `urgent`: with NCCL its messages have a stream of high priority, so that they need not wait for a place on the GPU
    while attention fills it.
    """
    # Where everyone is here, groups are numbered alike on all ranks. Else local synchronisation: ranks outside need
    # not take part, so that others may use them at will. Its groups are found by their ranks and by how many groups
    # this process has at the time, which must be equal on the members: so all parts are made at once.
    local = sum(map(len, parts)) < dist.get_world_size()
    if "nccl" in backend:
        # Halos and reductions are in flight at once, in communicators of their own, whose kernels wait on the GPU: they
        # must start in one order on all ranks, that in which the hosts post them. NCCL reads it where it first sends.
        os.environ.setdefault("NCCL_LAUNCH_ORDER_IMPLICIT", "1")
    backend = ALONE if dist.get_world_size() == 1 else backend
    made = [
        dist.new_group(
            list(part),
            timeout=timeout,
            backend=backend,
            pg_options=_high_priority(timeout) if urgent and backend == "nccl" else None,
            use_local_synchronization=local,
        )
        for part in parts
    ]
    return next(group for group in made if group not in (None, dist.GroupMember.NON_GROUP_MEMBER))


def _high_priority(timeout: timedelta) -> Any:
    options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
    options._timeout = timeout  # or torch warns that it takes the one that the group is given
    return options


def forget_addresses(*process_groups: dist.ProcessGroup) -> None:
    """Remove the ranks' addresses from the store; one rank calls this, while none of them connects.

    The next group of the same ranks takes this one's name once it is destroyed, and would connect to its addresses.
    """
    for process_group in process_groups:
        store = process_group.get_group_store()
        for key in store.list_keys():
            store.delete_key(key)


def choose_transport(device: torch.device, process_group: dist.ProcessGroup) -> Transport:
    """Transport for everyone's devices, equal on all ranks."""
    if device.type != "cuda":
        return "gloo"
    mine = (socket.gethostname(), _identity(device.index))
    all_devices: list[Any] = [None] * process_group.size()
    dist.all_gather_object(all_devices, mine, group=process_group)
    one_each = len(set(all_devices)) == len(all_devices)
    return "nccl" if one_each and dist.is_nccl_available() else "host"


class RankGpu(NamedTuple):
    """Where a rank computes: its machine, its GPU by UUID and number, and all GPUs that it sees."""

    host: str
    gpu: str
    number: int
    visible: tuple[str, ...]
    may_share: bool


def place_of(device: torch.device, *, may_share: bool) -> RankGpu:
    visible = tuple(map(_identity, range(torch.cuda.device_count())))
    return RankGpu(socket.gethostname(), visible[device.index], device.index, visible, may_share)


def check_sharing(everyone: Sequence[RankGpu]) -> None:
    """Raises a Refusal, on all ranks alike, where some share a GPU while others of their machine are idle."""
    used: dict[tuple[str, str], list[int]] = {}
    for rank, place in enumerate(everyone):
        used.setdefault((place.host, place.gpu), []).append(rank)
    idle = {(place.host, gpu) for place in everyone for gpu in place.visible} - used.keys()
    for (host, _), ranks in used.items():
        others = sum(each == host for each, _ in idle)
        if len(ranks) > 1 and others and not all(place.may_share for place in everyone):
            raise Refusal(
                f"ranks must not share a GPU while others are idle, got ranks {', '.join(map(str, ranks))} on GPU "
                f"{everyone[ranks[0]].number} of {host}, and {others} idle; nearest: a GPU for each "
                "(torch.cuda.set_device before .to('cuda'), or CUDA_VISIBLE_DEVICES), or --share-gpus"
            )


def _identity(index: int | None) -> str:
    return str(torch.cuda.get_device_properties(index).uuid)
