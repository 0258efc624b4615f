"""A group of which one rank is here and the others are pretended, for tensors without values (the meta device).

The code of this folder runs as it is: messages go to torch's `fake` backend, which drops them, and are counted.
"""

from collections import Counter
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from datetime import timedelta
from math import ceil
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from clear_dist.comm.counters import AMOUNTS, Counters
from clear_dist.comm.group import Group
from clear_dist.comm.process_groups import Transport
from clear_dist.comm.weight_shards import ShardedWeights, weights_of

META = torch.device("meta")


@dataclass(frozen=True, kw_only=True)
class Pretended(Group):
    """The other ranks are as this one."""

    @classmethod
    def of(cls, rank: int, size: int, transport: Transport) -> "Pretended":
        """Rank `rank` of `size`, whose messages `transport` would carry; closes the last one of this process."""
        if dist.is_initialized():
            dist.destroy_process_group()
        dist.init_process_group("cpu:fake,meta:fake", rank=rank, world_size=size, store=FakeStore())
        everyone = dist.distributed_c10d._get_default_group()
        return cls(
            rank=rank,
            ranks=tuple(range(size)),
            device=META,
            transport=transport,
            asked_transport=transport,
            timeout=timedelta(seconds=1),
            main=everyone,
            text=everyone,
            closes_torch=True,
        )

    @property
    def wire(self) -> torch.device:
        return META

    def split(self, count: int) -> "Pretended":
        return replace(self, ranks=self.ranks[:count])

    def gather_objects(self, value: Any) -> list[Any]:
        return [value] * self.size

    def broadcast_object(self, value: Any, source: int = 0) -> Any:
        return value

    def close(self) -> None:
        """Left for the next one to close."""


class Tally(Counters):
    """Counters of all bytes together, whatever the step."""

    def __init__(self) -> None:
        super().__init__()
        self.sums: Counter[str] = Counter(dict.fromkeys(AMOUNTS, 0))

    def add(self, name: str, amount: int) -> None:
        super().add(name, amount)
        self.sums[name] += amount


class PretendedShards(ShardedWeights):
    """Blocks that stay whole, and allocate and send as FSDP does when their weights are gathered."""

    def __init__(
        self, blocks: Sequence[nn.Module], group: Group, counters: Counters, *, whole: AbstractSet[Tensor]
    ) -> None:
        self._blocks = list(blocks)
        shares = (share_of(block, group.size, whole=whole) for block in blocks)
        self._shells = [PretendedShell(share, group.size, counters) for share in shares]
        self._hook()

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()


class PretendedShell:
    """A block's share of bytes, the message in which all shares arrive, and the weights that are made of it."""

    def __init__(self, share: int, ranks: int, counters: Counters) -> None:
        self._share = share
        self._ranks = ranks
        self._counters = counters
        self._arriving: Tensor | None = None
        self._gathered: Tensor | None = None

    def unshard(self, *, async_op: bool = False) -> None:
        if self._arriving is None and self._gathered is None:
            self._counters.add("weight_bytes_sent", self._share)
            self._arriving = self._everyone()
        if not async_op and self._gathered is None:
            self._gathered, self._arriving = self._everyone(), None

    def reshard(self) -> None:
        self._gathered = None

    def _everyone(self) -> Tensor:
        return torch.empty(self._ranks * self._share, dtype=torch.uint8, device=META)


def share_of(block: nn.Module, ranks: int, *, whole: AbstractSet[Tensor]) -> int:
    """Bytes of a rank's share of a block: whole rows of every parameter but `whole`, as many on all ranks."""
    return sum(ceil(len(x) / ranks) * (x.nbytes // len(x)) for _, _, x in weights_of(block) if x not in whole)
