"""The attention of the text queries, which see all stripes, from each rank's part of it.

average: Eq. 7 of CLEAR, the mean of the ranks' outputs. Its error grows with the number of ranks.
exact: outputs weighted by their share of the softmax, which each rank's log-sum-exp tells; what one rank would compute.

Shapes: B batch, T text, N heads, D head dim.
"""

from collections.abc import Callable
from typing import Literal

import torch
import torch.distributed as dist

from clear_dist.comm.counters import Counters, labelled
from clear_dist.comm.group import Group, reduce_op, telling_lost_peers
from clear_dist.merge import unweigh, weigh
from clear_dist.options import TextAttention


class TextReduce:
    """The reduction over all ranks of a group, used for one layer after the other; its buffers are kept."""

    def __init__(self, group: Group, mode: TextAttention, counters: Counters) -> None:
        assert mode in ("average", "exact"), mode
        self._group = group
        self._mode = mode
        self._counters = counters
        self._maximum: torch.Tensor | None = None
        self._sum: torch.Tensor | None = None
        self._posted: dist.Work | None = None
        """The last one, until it was waited for."""
        self._pending: PendingText | None = None
        self._aside = torch.cuda.Stream(group.device) if group.wire.type == "cuda" else None

    @torch.no_grad()
    def start(self, out_BTND: torch.Tensor, lse_BTN: torch.Tensor) -> "PendingText":
        """Begin to reduce; all ranks call this, in the same order and after the layer's halos were started.

        Args:
            out_BTND: this rank's part, [B, T, N, D]. average: attention to the text and to its stripe (K_p of Eq. 7);
                exact: to its stripe, and on one rank only to the text as well.
            lse_BTN: log-sum-exp of the part's scores, [B, T, N] float32; average does not use it.

        Raises:
            PeerLost: a rank went away.
        """
        assert self._pending is None, "start: the previous reduction was not waited for"
        assert lse_BTN.shape == out_BTND.shape[:-1] and lse_BTN.dtype == torch.float32
        self._pending = PendingText(self, self._begin(out_BTND, lse_BTN))
        return self._pending

    def drain(self) -> None:
        """Wait for what was posted; a forward that was broken off leaves it on its way."""
        if self._posted is not None:
            self._wait()

    @property
    def kept_bytes(self) -> int:
        """Of the buffers that are kept from one reduction to the next."""
        return sum(buffer.nbytes for buffer in (self._maximum, self._sum) if buffer is not None)

    def _begin(self, out_BTND: torch.Tensor, lse_BTN: torch.Tensor) -> Callable[[], torch.Tensor]:
        """Post what can be posted by now; returns what gives the result."""
        start = self._start_average if self._mode == "average" else self._start_exact
        return start(out_BTND, lse_BTN)

    def _start_average(self, out_BTND: torch.Tensor, _: torch.Tensor) -> Callable[[], torch.Tensor]:
        self._post_sum(out_BTND)

        def finish() -> torch.Tensor:
            self._wait()
            return self._unload(self._sum).div_(self._group.size)

        return finish

    def _start_exact(self, out_BTND: torch.Tensor, lse_BTN: torch.Tensor) -> Callable[[], torch.Tensor]:
        if self._aside is not None:
            return self._start_exact_aside(self._aside, out_BTND, lse_BTN)
        self._post_maximum(lse_BTN)

        def finish() -> torch.Tensor:
            # Not in start: gloo's wait would keep the host from the image queries until the slowest rank is here.
            self._wait()
            self._post_sum(weigh(out_BTND, lse_BTN, self._unload(self._maximum)))
            self._wait()
            return unweigh(self._unload(self._sum), out_BTND.dtype)

        return finish

    def _start_exact_aside(
        self, aside: torch.cuda.Stream, out_BTND: torch.Tensor, lse_BTN: torch.Tensor
    ) -> Callable[[], torch.Tensor]:
        """NCCL: on a stream of its own, which waits for the maximum while image queries are computed."""
        aside.wait_stream(torch.cuda.current_stream(aside.device))
        for part in (out_BTND, lse_BTN):
            part.record_stream(aside)  # or the caller's memory could be given away while `aside` reads it
        with torch.cuda.stream(aside):
            with telling_lost_peers():
                self._post_maximum(lse_BTN).wait()
            self._post_sum(weigh(out_BTND, lse_BTN, self._unload(self._maximum)))

        def finish() -> torch.Tensor:
            self._wait()
            return unweigh(self._unload(self._sum), out_BTND.dtype)

        return finish

    @labelled("comm: text start")
    def _post_maximum(self, lse_BTN: torch.Tensor) -> dist.Work:
        self._maximum = self._load(lse_BTN, self._maximum)
        return self._post(self._maximum, "max")

    @labelled("comm: text start")
    def _post_sum(self, part: torch.Tensor) -> None:
        self._sum = self._load(part, self._sum)
        self._post(self._sum, "sum")

    def _load(self, part: torch.Tensor, reuse: torch.Tensor | None) -> torch.Tensor:
        carried = self._group.wire_buffer(part.shape, part.dtype, reuse=reuse)
        carried.copy_(part, non_blocking=True)
        self._group.settle()
        return carried

    def _unload(self, carried: torch.Tensor | None) -> torch.Tensor:
        assert carried is not None
        return carried.to(self._group.device, non_blocking=True, copy=True)

    def _post(self, carried: torch.Tensor, op: Literal["sum", "max"]) -> dist.Work:
        self._counters.add("text_bytes_reduced", carried.nbytes)
        with telling_lost_peers():
            self._posted = dist.all_reduce(carried, reduce_op(op), group=self._group.text, async_op=True)
        return self._posted

    def _wait(self) -> None:
        work, self._posted = self._posted, None
        assert work is not None
        with self._counters.waiting("comm: text wait", self._group.wire), telling_lost_peers():
            work.wait()


class PendingText:
    """A reduction under way."""

    def __init__(self, reduction: TextReduce, finish: Callable[[], torch.Tensor]) -> None:
        self._reduction = reduction
        self._finish = finish

    @torch.no_grad()
    def wait(self) -> torch.Tensor:
        """The reduced output of the text queries, [B, T, N, D] in the parts' dtype; call it once.

        It is equal on all ranks; a `TextScatter` gives [B, S, N, D] of this rank's share.

        On NCCL the current stream waits, the host does not.

        Raises:
            PeerLost: a rank went away.
        """
        assert self._reduction._pending is self, "wait: this reduction was waited for already"
        self._reduction._pending = None
        return self._finish()
