"""Training on many ranks: each has a share of every block's weights and pictures of its own (FSDP2).

One rank runs the same: its share is all of it, and the others' gradients are none.
"""

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from clear_dist.comm.group import Group, telling_lost_peers
from clear_dist.comm.process_groups import new_process_group


def shard(model: Any, blocks: Sequence[Any], group: Group, *, whole: AbstractSet[Any]) -> None:
    """Shard `blocks`, in the order of calls; parameters outside of them stay on every rank, as those of `whole` do.

    Gradients become means over ranks, summed in float32. Raises ValueError where ranks share a GPU.
    """
    if group.copies_to_wire:
        raise ValueError("training needs a GPU for each rank; nearest: fewer ranks (--nproc)")
    backend = "nccl" if group.transport == "nccl" else "gloo"
    mesh = DeviceMesh.from_group(new_process_group([group.ranks], backend, group.timeout), group.device.type)
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    kept = set(whole)
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy, ignored_params=kept)
    inside = {weight for block in blocks for weight in block.parameters()}
    kept |= {weight for weight in model.parameters() if weight not in inside}
    fully_shard(model, mesh=mesh, mp_policy=policy, ignored_params=kept)
    for module in (*blocks, model):  # gloo knows no averages
        module.set_force_sum_reduction_for_comms(True)


def share_of(x: Tensor) -> Tensor:
    """This rank's share of a parameter or gradient."""
    return x.to_local() if isinstance(x, DTensor) else x


def whole(share: Tensor, like: Tensor) -> Tensor:
    """All ranks' shares of something that is cut as the parameter `like`, on every rank."""
    if not isinstance(like, DTensor):
        return share
    made = DTensor.from_local(share, like.device_mesh, like.placements, shape=like.shape, stride=like.stride())
    with telling_lost_peers():
        return made.full_tensor()


def norm_over_ranks(gradients: Sequence[Tensor], group: Group) -> Tensor:
    """Norm of all shares together."""
    squares = torch.stack([gradient.square().sum() for gradient in gradients]).sum()
    return group.all_reduce(squares, "sum").sqrt()
