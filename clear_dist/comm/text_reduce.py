"""Attention of the text queries, which see all stripes: the ranks' parts become one.

`Average` and `Exact` reduce over all ranks (`post`, `finish`), a step late (`post_late`; stale_exchange.py), or to each
rank's own text tokens (text_shards.py). All raise PeerLost where a rank went away.

Shapes: P ranks, B batch, T text, S text of one rank, N heads, D head dim.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from clear_dist.comm.counters import Counters, labelled
from clear_dist.comm.group import REDUCE_OPS, Group, telling_lost_peers
from clear_dist.merge import relay, unweigh, weigh
from clear_dist.options import TextAttention

LARGEST_CHANGE = 60.0
"""Cut-off for a log-sum-exp's change from step to step: e^60 and e^-60 are well inside float32."""


class Average:
    """Eq. 7 of CLEAR: mean of the ranks' outputs, with an error that grows with the number of ranks."""

    word: TextAttention = "average"
    weighs = False
    """Whether a part counts by its log-sum-exp."""

    def counts_text_keys(self, rank: int) -> bool:
        return True

    def post(self, ranks: "TextReduce", out_BTND: Tensor, lse_BTN: Tensor) -> None:
        ranks.post("sum", out_BTND)

    def finish(self, ranks: "TextReduce", out_BTND: Tensor, lse_BTN: Tensor, into_BTND: Tensor) -> None:
        ranks.drain()
        torch.div(ranks.held("sum"), ranks.group.size, out=into_BTND)

    def post_late(self, ranks: "TextReduce", out_BTND: Tensor, lse_BTN: Tensor) -> Tensor:
        before_BTND = ranks.held("sum") / ranks.group.size
        ranks.post("sum", out_BTND)
        return before_BTND


class Exact:
    """Outputs weighted by their share of the softmax, from each rank's log-sum-exp: as one rank would compute."""

    word: TextAttention = "exact"
    weighs = True

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

    def finish(self, ranks: "TextReduce", out_BTND: Tensor, lse_BTN: Tensor, into_BTND: Tensor) -> None:
        if ranks.aside is None:
            # Not in `post`: gloo's wait would keep the host from the image queries until the slowest rank is here.
            ranks.drain()
            self._post_sum(ranks, out_BTND, lse_BTN)
        ranks.drain()
        unweigh(ranks.held("sum"), into_BTND)

    def _post_sum(self, ranks: "TextReduce", out_BTND: Tensor, lse_BTN: Tensor) -> None:
        terms_BTND1 = ranks.room("sum", (*lse_BTN.shape, out_BTND.shape[-1] + 1), torch.float32)
        weigh(out_BTND, lse_BTN, ranks.held("max"), terms_BTND1)
        ranks.post("sum", terms_BTND1)

    def post_late(self, ranks: "TextReduce", out_BTND: Tensor, lse_BTN: Tensor) -> Tensor:
        """Output of the step before, whose log-sum-exp is this step's reference: no maximum need be reduced."""
        before_BTND, terms_BTND1, reference_BTN = torch.empty_like(out_BTND), ranks.held("sum"), ranks.held("max")
        relay(terms_BTND1, reference_BTN, out_BTND, lse_BTN, before_BTND, LARGEST_CHANGE)
        ranks.hold("max", reference_BTN)
        ranks.post("sum", terms_BTND1)
        return before_BTND


Reduction = Average | Exact
REDUCTIONS = (Average(), Exact())


class TextReduce:
    """Reduction over all ranks of a group, used for one layer after the other; its buffers are kept."""

    def __init__(self, group: Group, reduction: Reduction, counters: Counters) -> None:
        self.group = group
        self.aside = torch.cuda.Stream(group.device, priority=-1) if group.wire.type == "cuda" else None
        self._reduction = reduction
        self._counters = counters
        self._buffers: dict[str, Tensor] = {}
        self._posted: dist.Work | None = None
        self._finish: Callable[[Tensor], object] | None = None

    @torch.no_grad()
    def start(self, out_BTND: Tensor, lse_BTN: Tensor) -> "TextReduce":
        """Begin to reduce; all ranks call this, in the same order and after the layer's halos were started.

        A part is attention to a rank's stripe, and to the text if `counts_text_keys`; its log-sum-exp is float32.
        """
        assert self._finish is None, "start: the previous reduction was not waited for"
        assert lse_BTN.shape == out_BTND.shape[:-1] and lse_BTN.dtype == torch.float32
        self._finish = self._begin(out_BTND, lse_BTN)
        return self

    @torch.no_grad()
    def wait(self, into: Tensor) -> Tensor:
        """Write the text queries' output to `into`, [B, T, N, D], or [B, S, N, D] of my share, and return it.

        On NCCL only the stream waits.
        """
        finish, self._finish = self._finish, None
        assert finish is not None, "wait: this reduction was waited for already"
        finish(into)
        return into

    def drain(self) -> None:
        """Wait for what a forward that was broken off has posted."""
        work, self._posted = self._posted, None
        if work is not None:
            with self._counters.waiting("comm: text wait", self.group.wire), telling_lost_peers():
                work.wait()

    @property
    def kept_bytes(self) -> int:
        return sum(buffer.nbytes for buffer in self._buffers.values())

    def _begin(self, out_BTND: Tensor, lse_BTN: Tensor) -> Callable[[Tensor], object]:
        if self.group.size == 1:  # its part is the whole, and is copied once
            return lambda into_BTND: into_BTND.copy_(out_BTND)
        self._reduction.post(self, out_BTND, lse_BTN)
        return partial(self._reduction.finish, self, out_BTND, lse_BTN)

    @labelled("comm: text start")
    def post(self, op: Literal["sum", "max"], part: Tensor) -> dist.Work:
        carried = self.hold(op, part)
        self._counters.add("text_bytes_reduced", carried.nbytes)
        with telling_lost_peers():
            self._posted = dist.all_reduce(carried, REDUCE_OPS[op], group=self.group.text, async_op=True)
        return self._posted

    def room(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Where to compute on the device what `hold` is given next: the buffer itself, if it is there."""
        if self.group.copies_to_wire:
            return torch.empty(shape, dtype=dtype, device=self.group.device)
        return self._buffer(name, shape, dtype)

    def hold(self, name: str, x: Tensor) -> Tensor:
        """Copy `x` into the buffer `name` on the wire's side, unless it is that."""
        carried = self._buffer(name, x.shape, x.dtype)
        if carried is not x:
            carried.copy_(x, non_blocking=True)
        self.group.settle()
        return carried

    def held(self, name: str) -> Tensor:
        """The buffer `name` on the device; a copy only where that is not the wire's side."""
        return self._buffers[name].to(self.group.device, non_blocking=True)

    def _buffer(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        buffer = self._buffers[name] = self.group.wire_buffer(shape, dtype, reuse=self._buffers.get(name))
        return buffer
