"""Down-sampled keys (CLEAR's `..._down_4` checkpoints): each d x d tokens make one more key for all image queries.

As in the official code, keys and values are pooled after norm and rotation, with d x d weights that all heads share;
pooled keys have no positions. Ranks pool their own rows and exchange them as halos on a grid of pooled rows.

Shapes: B batch, R my rows, W columns, N heads, D head dim; Y = R / d, X = W / d; P pooled keys of the whole image.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from clear_dist.comm.halo_exchange import HaloExchange, PendingHalos


@dataclass(frozen=True, kw_only=True)
class Pooling:
    weights: tuple[Tensor, ...]
    """[d, d] per attention layer."""

    @property
    def factor(self) -> int:
        return len(self.weights[0])

    def transposed(self) -> "Pooling":
        """Weights for the transposed image."""
        return Pooling(weights=tuple(weight_dd.T for weight_dd in self.weights))


class PooledKeys:
    """Pooled keys and values of the whole image, of one layer at a time."""

    def __init__(self, pooling: Pooling, exchange: HaloExchange) -> None:
        self.exchange = exchange
        self._pooling = pooling
        self._under_way: tuple[Tensor, Tensor, PendingHalos] | None = None

    @torch.no_grad()
    def start(self, layer: int, key_BRWND: Tensor, value_BRWND: Tensor) -> None:
        """Pool my rows and start their exchange; all ranks call this in the same order."""
        key, value = (pool(x, self._pooling.weights[layer]) for x in (key_BRWND, value_BRWND))
        self._under_way = key, value, self.exchange.start(key, value)

    @torch.no_grad()
    def wait(self) -> tuple[Tensor, Tensor]:
        """Keys and values [B, P, N, D] in raster order; called once per `start`."""
        assert self._under_way is not None, "wait: nothing was started"
        (*mine, pending), self._under_way = self._under_way, None
        above, below = pending.wait()
        parts = ([x.flatten(2) for x in (above[i], mine[i], below[i])] for i in range(2))
        key, value = (torch.cat(rows, dim=1).unflatten(2, mine[0].shape[2:]).flatten(1, 2) for rows in parts)
        pending.release()
        return key, value


def pool(x_BRWND: Tensor, weight_dd: Tensor) -> Tensor:
    """Weighted sums over d x d tokens, [B, Y, X, N, D], accumulated in float32."""
    factor = len(weight_dd)
    tiles_BYdXdND = x_BRWND.unflatten(2, (-1, factor)).unflatten(1, (-1, factor))
    # Row by row: the products of all rows at once would be as large as the keys.
    rows = (
        (tiles_BYdXdND[:, :, row] * weight_dd[row, :, None, None]).sum(3, dtype=torch.float32) for row in range(factor)
    )
    return sum(rows, start=torch.zeros((), device=x_BRWND.device)).to(x_BRWND.dtype)
