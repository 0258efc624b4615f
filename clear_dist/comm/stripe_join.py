"""Once per step the outputs of all stripes are joined, so that scheduler and latents are equal on all ranks.

Shapes: B batch, H rows of the grid, R my rows, W columns, C channels.
"""

import torch
import torch.distributed as dist

from clear_dist.comm.counters import Counters
from clear_dist.comm.group import Group, telling_lost_peers
from clear_dist.geometry import Rows


class StripeJoin:
    """Joins stripes of tokens into the whole grid, on all ranks; its buffers are kept as long as the shape stays."""

    def __init__(self, group: Group, stripes: tuple[Rows, ...], counters: Counters) -> None:
        assert len(stripes) == group.size, f"{len(stripes)} stripes for {group.size} ranks"
        self._group = group
        self._stripes = stripes
        self._counters = counters
        self._mine: torch.Tensor | None = None
        self._all: torch.Tensor | None = None

    @torch.no_grad()
    def join(self, local: torch.Tensor) -> torch.Tensor:
        """All stripes, in order; all ranks call this.

        Args:
            local: this rank's tokens in raster order, [B, R*W, C] on the group's device.

        Returns:
            A new tensor [B, H*W, C], equal on all ranks.

        Raises:
            PeerLost: a rank went away.
        """
        group, heights = self._group, [len(stripe) for stripe in self._stripes]
        batch, tokens, channels = local.shape
        columns, rest = divmod(tokens, heights[group.rank])
        assert not rest, f"{tokens} tokens for {heights[group.rank]} rows"
        # All messages must be of one length: shorter stripes are padded, by one unit at most, and cut again below.
        shape = (batch, max(heights) * columns, channels)
        self._mine = group.wire_buffer(shape, local.dtype, reuse=self._mine)
        self._all = group.wire_buffer((group.size, *shape), local.dtype, reuse=self._all)
        self._mine[:, :tokens].copy_(local, non_blocking=True)
        group.settle()
        self._counters.add("join_bytes", self._mine.nbytes)
        with self._counters.waiting("comm: join", group.wire), telling_lost_peers():
            dist.all_gather(list(self._all.unbind()), self._mine, group=group.main)
        whole = torch.cat([self._all[rank, :, : rows * columns] for rank, rows in enumerate(heights)], dim=1)
        return whole.to(group.device)
