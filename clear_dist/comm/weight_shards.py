"""Weights sharded over ranks by FSDP2: a rank holds its share, the block that computes, and the next on its way.

FSDP works on a shell around each block that is no part of the model: the block keeps its class, its names and its
hooks. Once the shell is gone only hooks for `state_dict` are left, which find nothing to do.
"""

from collections.abc import Iterable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import _clear_sharding_prop_cache

from clear_dist.comm.counters import Counters, labelled
from clear_dist.comm.group import Group, telling_lost_peers
from clear_dist.comm.messages import all_gather
from clear_dist.comm.process_groups import forget_addresses, new_process_group


class ShardedWeights:
    """A model's blocks in shards until `remove`; all ranks of the group call the same, in the same order."""

    def __init__(
        self, blocks: Iterable[nn.Module], group: Group, counters: Counters, *, whole: AbstractSet[Any]
    ) -> None:
        """Shard `blocks` one by one, in calling order and without gradients, except the parameters `whole`."""
        assert group.size > 1, "one rank has nobody to share with"
        self._group = group
        backend = "nccl" if group.transport == "nccl" else "gloo"
        self._process_group = new_process_group([group.ranks], backend, group.timeout)
        mesh = DeviceMesh.from_group(self._process_group, group.device.type)
        gather = WeightGather(group, self._process_group, counters)
        self._closed = False
        self._blocks: list[nn.Module] = []
        self._shells: list[Any] = []
        for block in blocks:
            block.requires_grad_(False)  # else FSDP wants all weights of a block in one dtype
            shell: Any = fully_shard(Shell(block), mesh=mesh, reshard_after_forward=True, ignored_params=set(whole))
            shell.set_custom_all_gather(gather)
            self._blocks.append(block)
            self._shells.append(shell)
        self._hook()

    def remove(self) -> None:
        """Make all weights whole again on each rank, which must have the memory for it."""
        for hook in self._hooks:
            hook.remove()
        for block, shell in zip(self._blocks, self._shells, strict=True):
            shares = [(owner, name, weight) for owner, name, weight in weights_of(block) if isinstance(weight, DTensor)]
            shell.unshard()
            whole = [getattr(owner, name).detach().clone() for owner, name, _ in shares]
            shell.reshard()
            for (owner, name, share), weight in zip(shares, whole, strict=True):
                setattr(owner, name, nn.Parameter(weight, requires_grad=False))
                share.to_local().untyped_storage().resize_(0)  # those hooks hold it
        self.close()

    def close(self) -> None:
        """Destroy the process group, without which remaining shards are of no use; a second call has no effect."""
        if self._closed:
            return
        self._closed = True
        if self._group.size < dist.get_world_size():
            self._group.barrier()
            if self._group.rank == 0:
                forget_addresses(self._process_group)
            self._group.barrier()
        dist.destroy_process_group(self._process_group)
        _clear_sharding_prop_cache()  # or an equal mesh would be given what was found for this one, its group included

    def _hook(self) -> None:
        self._hooks = [hook for index, block in enumerate(self._blocks) for hook in self._hooked(block, index)]

    def _hooked(self, block: nn.Module, index: int) -> tuple[Any, Any]:
        # Also where the forward fails: what is gathered must not stay.
        return (
            block.register_forward_pre_hook(partial(self._before, index), prepend=True),
            block.register_forward_hook(partial(self._after, index), always_call=True),
        )

    def _before(self, index: int, *_: Any) -> None:
        self._shells[index].unshard()
        for following in self._shells[index + 1 : index + 2]:
            following.unshard(async_op=True)

    def _after(self, index: int, *_: Any) -> None:
        self._shells[index].reshard()


class Shell(nn.Module):
    """The module that FSDP shards."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block


class WeightGather:
    """FSDP's all-gather, through a group's transport."""

    def __init__(self, group: Group, process_group: dist.ProcessGroup, counters: Counters) -> None:
        self._group = group
        self._process_group = process_group
        self._counters = counters

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    @labelled("comm: weights start")
    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Any, async_op: bool = False) -> "Gathering":
        """Begin to gather; FSDP waits for the result, whatever `async_op` says."""
        # As bytes: gloo does not know every dtype.
        mine, everyone = input_tensor.view(torch.uint8), output_tensor.view(torch.uint8)
        received = everyone
        if self._group.copies_to_wire:
            mine = self._group.wire_buffer(mine.shape, mine.dtype).copy_(mine, non_blocking=True)
            received = self._group.wire_buffer(everyone.shape, everyone.dtype)
            self._group.settle()
        self._counters.add("weight_bytes_sent", mine.nbytes)
        with telling_lost_peers():
            work = all_gather(received, mine, group=self._process_group, async_op=True)
        return Gathering(work, partial(self._finish, mine, received, everyone))

    def _finish(self, mine: Tensor, received: Tensor, everyone: Tensor, work: dist.Work) -> None:
        with self._counters.waiting("comm: weights wait", self._group.wire), telling_lost_peers():
            work.wait()
        if received is not everyone:
            everyone.copy_(received)


class Gathering(dist.Work):
    def __init__(self, work: dist.Work, finish: Any) -> None:
        super().__init__()
        self._work = work
        self._finish = finish

    def wait(self, *_: Any) -> bool:
        """On CUDA the current stream waits, the host does not."""
        self._finish(self._work)
        return True


def weights_of(block: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    """Each parameter with its module and its name there."""
    for module in block.modules():
        for name, weight in module.named_parameters(recurse=False):
            yield module, name, weight
