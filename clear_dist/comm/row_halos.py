"""One row of halo above and below a stripe of feature maps: what a 3x3 convolution of the stripe needs.

Shapes: B batch, C channels, E my rows with one row of halo on either side, W columns.
"""

import torch

from clear_dist.comm.counters import Counters
from clear_dist.comm.group import Group, telling_lost_peers
from clear_dist.comm.messages import Message, post

ABOVE, BELOW = (1, 0), (-2, -1)
"""For the neighbour on that side: the row that it is sent, and the row that its own goes to."""


class RowHalos:
    """The exchange of border rows between stripes that lie on the ranks in ascending order of rows."""

    def __init__(self, group: Group, counters: Counters) -> None:
        self._group = group
        self._counters = counters
        sides = ((group.rank - 1, ABOVE), (group.rank + 1, BELOW))
        self._neighbours = [(peer, *rows) for peer, rows in sides if 0 <= peer < group.size]

    @torch.no_grad()
    def fill(self, stripe_BCEW: torch.Tensor) -> None:
        """Fill the first and the last row with the neighbours' rows; all ranks call this, in the same order.

        Args:
            stripe_BCEW: on the group's device, at least one row besides the halos. A halo beyond the border of the
                picture is left as it is.

        Raises:
            PeerLost: a neighbour went away.
        """
        group = self._group
        shape = stripe_BCEW[:, :, 0].shape
        incoming = [group.wire_buffer(shape, stripe_BCEW.dtype) for _ in self._neighbours]
        outgoing = [group.wire_buffer(shape, stripe_BCEW.dtype) for _ in self._neighbours]
        for message, (_, mine, _) in zip(outgoing, self._neighbours, strict=True):
            message.copy_(stripe_BCEW[:, :, mine], non_blocking=True)
            self._counters.add("other_bytes", message.nbytes)
        group.settle()
        with self._counters.waiting("comm: border rows", group.wire), telling_lost_peers("a neighbour"):
            for work in post(group, self._addressed(incoming), self._addressed(outgoing)):
                work.wait()
        for message, (_, _, place) in zip(incoming, self._neighbours, strict=True):
            stripe_BCEW[:, :, place].copy_(message)

    def _addressed(self, buffers: list[torch.Tensor]) -> list[Message]:
        return [(peer, buffer) for (peer, _, _), buffer in zip(self._neighbours, buffers, strict=True)]
