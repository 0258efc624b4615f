"""Attention of the text queries, which see all stripes: the ranks' parts become one.

`Average` and `Exact` are the two ways, `TextReduce` the messages that they post. Each has three forms: reduced over all
ranks (`post`, `finish`), a step late (`post_late`; stale_exchange.py), and each rank its own text tokens (`packed`,
`merged`; text_shards.py). All raise PeerLost where a rank went away.

Shapes: P ranks, B batch, T text, S text of one rank, N heads, D head dim.
"""

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from clear_dist.comm.counters import Counters, labelled
from clear_dist.comm.group import Group, reduce_op, telling_lost_peers
from clear_dist.merge import unweigh, weigh
from clear_dist.options import TextAttention

LARGEST_CHANGE = 60.0
"""Cut-off for a log-sum-exp's change from step to step: e^60 and e^-60 are well inside float32."""


class Average:
    """Eq. 7 of CLEAR: the mean of the ranks' outputs. Its error grows with the number of ranks."""

    word: TextAttention = "average"

    def counts_text_keys(self, rank: int) -> bool:
        """Whether the part of `rank` includes the text keys."""
        return True

    def post(self, ranks: "TextReduce", out_BTND: Tensor, lse_BTN: Tensor) -> None:
        ranks.post("sum", out_BTND)

    def finish(self, ranks: "TextReduce", out_BTND: Tensor, lse_BTN: Tensor) -> Tensor:
        ranks.drain()
        return ranks.held("sum").div_(ranks.group.size)

    def post_late(self, ranks: "TextReduce", out_BTND: Tensor, lse_BTN: Tensor) -> Tensor:
        """Send this step's part; returns the mean of the step before."""
        before_BTND = ranks.held("sum")
        ranks.post("sum", out_BTND)
        return before_BTND.div_(ranks.group.size)

    def packed(self, out_BTND: Tensor, lse_BTN: Tensor) -> Tensor:
        return out_BTND

    def merged(self, parts_PBSND: Tensor, head_dim: int) -> Tensor:
        return parts_PBSND.mean(0, dtype=torch.float32).to(parts_PBSND.dtype)


class Exact:
    """Outputs weighted by their share of the softmax, from each rank's log-sum-exp: what one rank would compute."""

    word: TextAttention = "exact"

    def counts_text_keys(self, rank: int) -> bool:
        return rank == 0

    def post(self, ranks: "TextReduce", out_BTND: Tensor, lse_BTN: Tensor) -> None:
        aside = ranks.aside
        if aside is None:
            ranks.post("max", lse_BTN)
            return
        # NCCL: on a stream of its own, which waits for the maximum while image queries are computed.
        aside.wait_stream(torch.cuda.current_stream(aside.device))
        for part in (out_BTND, lse_BTN):
            part.record_stream(aside)  # or the caller's memory could be given away while `aside` reads it
        with torch.cuda.stream(aside):
            with telling_lost_peers():
                ranks.post("max", lse_BTN).wait()
            self._post_sum(ranks, out_BTND, lse_BTN)

    def finish(self, ranks: "TextReduce", out_BTND: Tensor, lse_BTN: Tensor) -> Tensor:
        if ranks.aside is None:
            # Not in `post`: gloo's wait would keep the host from the image queries until the slowest rank is here.
            ranks.drain()
            self._post_sum(ranks, out_BTND, lse_BTN)
        ranks.drain()
        return unweigh(ranks.held("sum"), out_BTND.dtype)

    def _post_sum(self, ranks: "TextReduce", out_BTND: Tensor, lse_BTN: Tensor) -> None:
        ranks.post("sum", weigh(out_BTND, lse_BTN, ranks.held("max")))

    def post_late(self, ranks: "TextReduce", out_BTND: Tensor, lse_BTN: Tensor) -> Tensor:
        """Send this step's part; returns the output of the step before.

        Weights are relative to all ranks' log-sum-exp of the step before. Any reference does that all ranks know and
        that is near the maximum, so the maximum needs no reduction.
        """
        before_BTND1 = ranks.held("sum")
        reference_BTN = ranks.held("max") + before_BTND1[..., -1].log()
        ranks.hold("max", reference_BTN)
        near_BTN = lse_BTN.clamp(reference_BTN - LARGEST_CHANGE, reference_BTN + LARGEST_CHANGE)
        ranks.post("sum", weigh(out_BTND, near_BTN, reference_BTN))
        return unweigh(before_BTND1, out_BTND.dtype)

    def packed(self, out_BTND: Tensor, lse_BTN: Tensor) -> Tensor:
        """The output, then the bits of the float32 log-sum-exp in the output's dtype."""
        return torch.cat([out_BTND, lse_BTN.unsqueeze(-1).view(out_BTND.dtype)], dim=-1)

    def merged(self, parts_PBSND: Tensor, head_dim: int) -> Tensor:
        lse_PBSN = parts_PBSND[..., head_dim:].contiguous().view(torch.float32).squeeze(-1)
        weighed = weigh(parts_PBSND[..., :head_dim], lse_PBSN, lse_PBSN.amax(0))
        return unweigh(weighed.sum(0), parts_PBSND.dtype)


Reduction = Average | Exact
REDUCTIONS = (Average(), Exact())


class TextReduce:
    """The reduction over all ranks of a group, used for one layer after the other; its buffers are kept."""

    def __init__(self, group: Group, reduction: Reduction, counters: Counters) -> None:
        self.group = group
        self.aside = torch.cuda.Stream(group.device) if group.wire.type == "cuda" else None
        self._reduction = reduction
        self._counters = counters
        self._buffers: dict[str, Tensor] = {}
        self._posted: dist.Work | None = None
        self._pending: PendingText | None = None

    @torch.no_grad()
    def start(self, out_BTND: Tensor, lse_BTN: Tensor) -> "PendingText":
        """Begin to reduce; all ranks call this, in the same order and after the layer's halos were started.

        Args:
            out_BTND: this rank's part, [B, T, N, D]: attention to its stripe, and to the text if `counts_text_keys`.
            lse_BTN: log-sum-exp of the part's scores, [B, T, N] float32.
        """
        assert self._pending is None, "start: the previous reduction was not waited for"
        assert lse_BTN.shape == out_BTND.shape[:-1] and lse_BTN.dtype == torch.float32
        self._pending = PendingText(self, self._begin(out_BTND, lse_BTN))
        return self._pending

    def drain(self) -> None:
        """Wait for what was posted; a forward that was broken off leaves it on its way."""
        work, self._posted = self._posted, None
        if work is not None:
            with self._counters.waiting("comm: text wait", self.group.wire), telling_lost_peers():
                work.wait()

    @property
    def kept_bytes(self) -> int:
        """Bytes of the buffers."""
        return sum(buffer.nbytes for buffer in self._buffers.values())

    def _begin(self, out_BTND: Tensor, lse_BTN: Tensor) -> Callable[[], Tensor]:
        """Post what can be posted by now; returns what gives the result."""
        self._reduction.post(self, out_BTND, lse_BTN)
        return partial(self._reduction.finish, self, out_BTND, lse_BTN)

    @labelled("comm: text start")
    def post(self, op: Literal["sum", "max"], part: Tensor) -> dist.Work:
        """Begin an all-reduce of `part`, in the buffer `op`."""
        carried = self.hold(op, part)
        self._counters.add("text_bytes_reduced", carried.nbytes)
        with telling_lost_peers():
            self._posted = dist.all_reduce(carried, reduce_op(op), group=self.group.text, async_op=True)
        return self._posted

    def hold(self, name: str, x: Tensor) -> Tensor:
        """Copy `x` into the buffer `name` on the wire's side."""
        carried = self._buffers[name] = self.group.wire_buffer(x.shape, x.dtype, reuse=self._buffers.get(name))
        carried.copy_(x, non_blocking=True)
        self.group.settle()
        return carried

    def held(self, name: str) -> Tensor:
        """A copy of the buffer `name` on the group's device."""
        return self._buffers[name].to(self.group.device, non_blocking=True, copy=True)


class PendingText:
    """A reduction under way."""

    def __init__(self, reduce: TextReduce, finish: Callable[[], Tensor]) -> None:
        self._reduce = reduce
        self._finish = finish

    @torch.no_grad()
    def wait(self) -> Tensor:
        """The text queries' output, [B, T, N, D] in the parts' dtype, equal on all ranks; to be called once.

        From a `TextScatter`: [B, S, N, D] of this rank's share. On NCCL the current stream waits, the host does not.
        """
        assert self._reduce._pending is self, "wait: this reduction was waited for already"
        self._reduce._pending = None
        return self._finish()
