"""TEXT TOKENS ARE EXCHANGED HERE where each rank has a share of them (`TextPlan`) instead of all.

    gather.start(query, key, value)          my tokens to all ranks, as soon as they are projected
    ...                                      meanwhile keys, values and queries of the image
    gather.wait()                            everyone's are there: all ranks attend with all text queries
    scatter.start(out, lse)                  each rank's part of their attention to whose tokens they are
    ...                                      meanwhile my rows attend to my keys
    out = scatter.wait()                     all parts of my tokens, merged: by log-sum-exp, or their mean (Eq. 7)

Parts are sent in the model's dtype and merged on arrival: a reduce-scatter would need the maximum of the log-sum-exps
first, and sums in float32. With 512 text tokens of 3072 channels in bfloat16, one of 8 ranks receives 8.3 MB and 2.8 MB
a layer; the all-reduce of replicated text brings 5.5 MB (`Average`) or 11.2 MB (`Exact`). All raise PeerLost.

Shapes: P ranks, B batch, T text tokens (of all ranks), S of my share, L = T + image tokens, N heads, D head dim.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist

from clear_dist.comm.counters import Counters, labelled
from clear_dist.comm.group import Group, telling_lost_peers
from clear_dist.comm.messages import all_gather
from clear_dist.comm.text_reduce import Reduction, TextReduce
from clear_dist.geometry import TextPlan


class TextGather:
    """Everyone's text tokens on all ranks, for one layer after the other; nothing is sent where text is replicated."""

    def __init__(self, group: Group, plan: TextPlan, counters: Counters) -> None:
        self.plan = plan
        self._group = group
        self._counters = counters
        self._mine: torch.Tensor | None = None
        self._all: torch.Tensor | None = None
        self._awaited: tuple[torch.Tensor, ...] = ()
        self._posted: dist.Work | None = None

    @torch.no_grad()
    @labelled("comm: text tokens start")
    def start(self, *tensors_BLND: torch.Tensor) -> None:
        """Send my share of queries, keys and values; all ranks call this, in the same order, where text is shared.

        Each is [B, L, N, D] on the group's device: T - S text tokens for `wait` to fill in, my S, then the image's.
        """
        assert self.plan.is_shared, "start: the text is not shared"
        assert self._posted is None, "start: the previous tokens were not waited for"
        self._awaited = tensors_BLND
        group, plan, like = self._group, self.plan, tensors_BLND[0]
        # All messages must be of one length: shorter shares are padded, by one token at most.
        shape = (len(tensors_BLND), len(like), max(plan.counts), *like.shape[2:])
        self._mine = group.wire_buffer(shape, like.dtype, reuse=self._mine)
        self._all = group.wire_buffer((group.size, *shape), like.dtype, reuse=self._all)
        first, own = plan.elsewhere, plan.counts[plan.rank]
        for message, x in zip(self._mine, tensors_BLND, strict=True):
            message[:, :own].copy_(x[:, first : first + own], non_blocking=True)
        group.settle()
        self._counters.add("text_bytes_gathered", self._mine.nbytes)
        with telling_lost_peers():
            self._posted = all_gather(self._all.flatten(0, 1), self._mine, group=group.text, async_op=True)

    @torch.no_grad()
    def wait(self) -> None:
        """Fill in the others' tokens; on NCCL the current stream waits, the host does not."""
        if not self.plan.is_shared:
            return
        assert self._posted is not None and self._all is not None, "wait: no tokens were sent"
        self.drain()
        tensors_BLND, self._awaited = self._awaited, ()
        arrived = self._all.to(self._group.device, non_blocking=True)
        for number, x in enumerate(tensors_BLND):
            shares = [arrived[rank, number, :, :count] for rank, count in enumerate(self.plan.counts)]
            del shares[self.plan.rank]
            torch.cat(shares, dim=1, out=x[:, : self.plan.elsewhere])

    def drain(self) -> None:
        work, self._posted = self._posted, None
        if work is not None:
            with self._counters.waiting("comm: text tokens wait", self._group.wire), telling_lost_peers():
                work.wait()


class TextScatter(TextReduce):
    """Attention of the text queries from each rank's part of it, where their tokens are: [B, S, N, D] on each rank."""

    def __init__(self, group: Group, reduction: Reduction, counters: Counters, *, plan: TextPlan) -> None:
        super().__init__(group, reduction, counters)
        self._plan = plan
        self._own = plan.counts[plan.rank]

    def _begin(self, out_BTND: torch.Tensor, lse_BTN: torch.Tensor) -> Callable[[], torch.Tensor]:
        self._post_parts(self._reduction.packed(out_BTND, lse_BTN))
        return partial(self._merge, out_BTND.shape[-1])

    def _merge(self, head_dim: int) -> torch.Tensor:
        self.drain()
        parts_PBSND = self.held("received").unflatten(0, (self.group.size, self._own)).transpose(1, 2)
        return self._reduction.merged(parts_PBSND, head_dim)

    @labelled("comm: text start")
    def _post_parts(self, part_BTND: torch.Tensor) -> None:
        """Send each rank its part, along the first dimension: only that may differ in length."""
        before, elsewhere = self._plan.before, self._plan.elsewhere
        in_order_of_ranks = part_BTND[:, :before], part_BTND[:, elsewhere:], part_BTND[:, before:elsewhere]
        sent = self.hold("sent", torch.cat(in_order_of_ranks, dim=1).transpose(0, 1))
        received = self._buffers["received"] = self.group.wire_buffer(
            (self.group.size * self._own, *sent.shape[1:]), sent.dtype, reuse=self._buffers.get("received")
        )
        self._counters.add("text_bytes_reduced", sent.nbytes)
        with telling_lost_peers():
            self._posted = dist.all_to_all_single(
                received,
                sent,
                output_split_sizes=[self._own] * self.group.size,
                input_split_sizes=list(self._plan.counts),
                group=self.group.text,
                async_op=True,
            )
