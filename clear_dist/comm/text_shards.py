"""TEXT TOKENS ARE EXCHANGED HERE where each rank has a share of them (`TextPlan`) instead of all.

    gather.start(query, key, value)          my tokens to all ranks, as soon as they are projected
    ...                                      meanwhile keys, values and queries of the image
    gather.wait()                            everyone's are there: all ranks attend with all text queries
    scatter.start(out, lse)                  each rank's part of their attention to whose tokens they are
    ...                                      meanwhile my rows attend to my keys
    scatter.wait(out)                        all parts of my tokens, merged: by log-sum-exp, or their mean (Eq. 7)

Parts are sent in the model's dtype and merged on arrival: a reduce-scatter would need the maximum of the log-sum-exps
first, and sums in float32. With 512 text tokens of 3072 channels in bfloat16, one of 8 ranks receives 8.3 MB and 2.8 MB
a layer; the all-reduce of replicated text brings 5.5 MB (`Average`) or 11.2 MB (`Exact`). All raise PeerLost.

Shapes: P ranks, B batch, T text tokens (of all ranks), S of my share, L = T + image tokens, N heads, D head dim.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist

from clear_dist.comm.counters import Counters, labelled
from clear_dist.comm.group import Group, telling_lost_peers
from clear_dist.comm.messages import all_gather, pack
from clear_dist.comm.text_reduce import Reduction, TextReduce
from clear_dist.geometry import TextPlan
from clear_dist.kernels import merging, usable
from clear_dist.merge import merge_stacked, pack_part, unpack_lse


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
        shape = (max(plan.counts), len(tensors_BLND), len(like), *like.shape[2:])
        self._mine = group.wire_buffer(shape, like.dtype, reuse=self._mine)
        self._all = group.wire_buffer((group.size, *shape), like.dtype, reuse=self._all)
        first, own = plan.elsewhere, plan.counts[plan.rank]
        pack(group, [x[:, first : first + own] for x in tensors_BLND], self._mine[:own])
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
        counts, own = self.plan.counts, self.plan.rank
        if arrived.is_meta or usable(arrived.device.type):
            return merging.spread(arrived, counts, own, tensors_BLND)
        for number, x in enumerate(tensors_BLND):
            shares = [share[:count, number].transpose(0, 1) for share, count in zip(arrived, counts, strict=True)]
            del shares[own]
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

    def _begin(self, out_BTND: torch.Tensor, lse_BTN: torch.Tensor) -> Callable[[torch.Tensor], object]:
        self._post_parts(out_BTND, lse_BTN if self._reduction.weighs else None)
        return self._merge

    def _merge(self, into_BSND: torch.Tensor) -> None:
        self.drain()
        head_dim = into_BSND.shape[-1]
        parts_PBSND = self.held("received").unflatten(0, (self.group.size, self._own)).transpose(1, 2)
        lses_PBSN = unpack_lse(parts_PBSND, head_dim) if self._reduction.weighs else None
        merge_stacked(parts_PBSND[..., :head_dim], lses_PBSN, into_BSND)

    @labelled("comm: text start")
    def _post_parts(self, out_BTND: torch.Tensor, lse_BTN: torch.Tensor | None) -> None:
        """Send each rank its part, along the first dimension: only that may differ in length."""
        batch, tokens, heads, head_dim = out_BTND.shape
        behind = 0 if lse_BTN is None else lse_BTN.itemsize // out_BTND.itemsize
        packed = self.room("sent", (tokens, batch, heads, head_dim + behind), out_BTND.dtype)
        # Attention has my tokens last, messages have those of all ranks in order.
        order = {"first": self._plan.elsewhere, "to": self._plan.before}
        pack_part(out_BTND, lse_BTN, packed.transpose(0, 1), **order)
        sent = self.hold("sent", packed)
        received = self._buffer("received", (self.group.size * self._own, *sent.shape[1:]), sent.dtype)
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
