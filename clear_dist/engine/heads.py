"""Queries, keys and values of one layer on one rank, from their projection to their attention.

Text comes first, whatever the model's own order: other ranks' (where each has a share), mine, then my image rows.

Shapes: B batch, L tokens of this rank, N heads, D head dim.
"""

from torch import Tensor

from clear_dist.comm.halo_exchange import PendingHalos
from clear_dist.engine.family import Stripes


class Heads:
    """Buffers that a block fills in its own order; each start comes once, when its tokens are there."""

    def __init__(
        self,
        striped: Stripes,
        layer: int,
        like: Tensor,
        *,
        tokens: int,
        heads: int,
        head_dim: int,
        alone: bool = False,
        own_text: bool = False,
    ) -> None:
        """Room for `tokens` of this rank, text and image (image only: `alone`), in the dtype of `like` [B, ...].

        `own_text`: text of this layer only, whole and equal on all ranks, none of it padding; no down-sampled keys.
        """
        self.striped = striped
        self.layer = layer
        self._alone = alone
        self._own_text = own_text
        self._elsewhere = 0 if alone or own_text else striped.text_plan.elsewhere
        shape = len(like), self._elsewhere + tokens, heads, head_dim
        self._qkv_BLND = [like.new_empty(shape) for _ in range(3)]
        self._halos: PendingHalos | None = None

    @property
    def has_others(self) -> bool:
        """Whether other ranks wait for border rows."""
        return self.striped.running_cut.group.size > 1

    @property
    def own(self) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of my tokens, [B, L, N, D] each, to write to."""
        query, key, value = (x[:, self._elsewhere :] for x in self._qkv_BLND)
        return query, key, value

    def start_halos(self) -> None:
        """Send border rows, once the image's keys and values are there; queries may follow."""
        _, key, value = self.own
        self._halos = self.striped.start_halos(self.layer, key, value, alone=self._alone, own_text=self._own_text)

    def start_text(self) -> None:
        """Send the text, once its queries, keys and values are there; nothing where all ranks have all of it."""
        if not (self._alone or self._own_text):
            self.striped.start_text(self.layer, *self._qkv_BLND)

    def attend(self, out_BLC: Tensor | None = None) -> Tensor:
        """Attention's output of my tokens [B, L, N x D], in `out_BLC` if given; called once, when all are there."""
        assert self._halos is not None, "attend: halos were not started"
        # Released as early as possible, halos too: they may hold keys and values.
        (query_BLND, key_BLND, value_BLND), halos = self._qkv_BLND, self._halos
        self._qkv_BLND, self._halos = [], None
        out_BLND = None if out_BLC is None else out_BLC.unflatten(2, query_BLND.shape[2:])
        qkv_BLND = query_BLND, key_BLND, value_BLND
        return self.striped.attend(
            self.layer, halos, *qkv_BLND, alone=self._alone, own_text=self._own_text, out_BLND=out_BLND
        ).flatten(2)
