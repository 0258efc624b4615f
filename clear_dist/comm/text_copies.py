"""COPIES OF THE TEXT (I-Max) ARE REDUCED HERE: those of a block among the ranks whose rows touch it.

Only these ranks hold the block's copies, and send each other their parts of what the copies' queries attend to. A rank
whose blocks are all its own sends nothing. Parts travel in the model's dtype and are merged on arrival, in the order of
ranks: all holders of a copy have it equal to the bit. Raises PeerLost where a rank went away.

Shapes: B batch, T text tokens of the copies held, N heads, D head dim.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from clear_dist.comm.counters import Counters, labelled
from clear_dist.comm.group import Group, telling_lost_peers
from clear_dist.comm.text_reduce import Reduction, TextReduce
from clear_dist.geometry import CopiedText, Rows
from clear_dist.merge import merge_stacked, pack_part, unpack_lse


class TextCopies(TextReduce):
    """Attention of the copies' queries, each from the parts of all ranks that hold it: [B, T, N, D] on each of them."""

    def __init__(self, group: Group, reduction: Reduction, counters: Counters, *, plan: CopiedText) -> None:
        super().__init__(group, reduction, counters)
        self._plan = plan
        mine = self._mine = plan.held[plan.place]
        self._band = plan.counts[0] // len(mine)
        self._with = [Rows(0, 0) if peer == plan.place else bands for peer, bands in enumerate(plan.shared)]
        self._counts = [len(bands) * self._band for bands in self._with]
        self._is_alone = sum(map(len, plan.held)) == plan.held[-1].stop

    def _begin(self, out_BTND: Tensor, lse_BTN: Tensor) -> Callable[[Tensor], object]:
        if self._is_alone:  # as is every rank: no two hold a copy
            return lambda into_BTND: into_BTND.copy_(out_BTND)
        packed = self._post_parts(out_BTND, lse_BTN if self._reduction.weighs else None)
        return lambda into_BTND: self._merge(packed, into_BTND)

    @labelled("comm: text start")
    def _post_parts(self, out_BTND: Tensor, lse_BTN: Tensor | None) -> Tensor:
        """Send each rank my parts of what it holds, too; returns all of them, tokens first as they travel."""
        batch, tokens, heads, head_dim = out_BTND.shape
        behind = 0 if lse_BTN is None else lse_BTN.itemsize // out_BTND.itemsize
        packed_TBND = out_BTND.new_empty(tokens, batch, heads, head_dim + behind)
        pack_part(out_BTND, lse_BTN, packed_TBND.transpose(0, 1), first=0, to=0)
        shape = sum(self._counts), *packed_TBND.shape[1:]
        sent = self.room("sent", shape, packed_TBND.dtype)
        torch.cat([packed_TBND[self._tokens_of(bands)] for bands in self._with], out=sent)
        sent = self.hold("sent", sent)
        received = self._buffer("received", shape, sent.dtype)
        self._counters.add("text_bytes_reduced", sent.nbytes)
        with telling_lost_peers():
            self._posted = dist.all_to_all_single(
                received, sent, self._counts, self._counts, group=self.group.text, async_op=True
            )
        return packed_TBND

    def _merge(self, packed_TBND: Tensor, into_BTND: Tensor) -> None:
        self.drain()
        head_dim = into_BTND.shape[-1]
        parts = [*self.held("received").split(self._counts)]
        held = [*self._with]
        parts[self._plan.place], held[self._plan.place] = packed_TBND, self._mine
        for band in self._mine.numbers:
            where = [
                part[self._band * (band - bands.start) :][: self._band]
                for part, bands in zip(parts, held, strict=True)
                if band in bands.numbers
            ]
            parts_PBTND = torch.stack(where).transpose(1, 2)
            lses_PBTN = unpack_lse(parts_PBTND, head_dim) if self._reduction.weighs else None
            mine = self._tokens_of(Rows(band, band + 1))
            merge_stacked(parts_PBTND[..., :head_dim], lses_PBTN, into_BTND[:, mine])

    def _tokens_of(self, bands: Rows) -> slice:
        first = self._band * (bands.start - self._mine.start)
        return slice(first, first + self._band * len(bands))
