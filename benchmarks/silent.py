"""What a step would take without overlap, and without any communication: stand-ins for an image's exchanges."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from clear_dist.comm.halo_exchange import HaloExchange, Halos
from clear_dist.comm.text_reduce import TextReduce
from clear_dist.models.exchanges import Exchange, Exchanges
from clear_dist.models.striped import StripedModel


@dataclass(frozen=True)
class Done:
    """In place of something pending: its result is there."""

    result: Any
    lag: bool = False
    release: Callable[[], None] = lambda: None

    def wait(self) -> Any:
        return self.result


@dataclass(frozen=True)
class Blocking:
    """What is started is waited for at once."""

    inner: HaloExchange | TextReduce
    lags: bool = False

    def start(self, *tensors: Tensor) -> Done:
        return Done(self.inner.start(*tensors).wait())


@dataclass(frozen=True)
class NoHalos:
    """Halos of zeros."""

    rows: tuple[int, int]
    """Above and below."""
    lags: bool = False
    """Whether they pass for those of the step before."""

    def start(self, key_BRWND: Tensor, value_BRWND: Tensor) -> Done:
        batch, _, *row = key_BRWND.shape
        above, below = (key_BRWND.new_zeros(2, batch, rows, *row) for rows in self.rows)
        halos: Halos = above, below
        return Done(halos, lag=self.lags)


class NoReduction:
    """This rank's part in place of everyone's."""

    def start(self, out_BTND: Tensor, lse_BTN: Tensor) -> Done:
        return Done(out_BTND)


@dataclass(frozen=True)
class NoJoin:
    """Zeros in place of the others' stripes."""

    stripes: tuple[int, ...]
    rank: int

    def join(self, local: Tensor) -> Tensor:
        row_tokens = local.shape[1] // self.stripes[self.rank]
        parts = [local.new_zeros(len(local), rows * row_tokens, local.shape[2]) for rows in self.stripes]
        parts[self.rank] = local
        return torch.cat(parts, dim=1)


@dataclass(frozen=True)
class Wrapped:
    """An image's exchanges, each replaced by what `wrap` makes of it."""

    exchanges: Exchanges
    wrap: Callable[[Exchange], Exchange]

    def of(self, turn: int, layer: int) -> Exchange:
        return self.wrap(self.exchanges.of(turn, layer))

    def has_begun(self, turn: int) -> bool:
        return self.exchanges.has_begun(turn)

    def drain(self) -> None:
        self.exchanges.drain()

    @property
    def stale_bytes(self) -> int:
        return self.exchanges.stale_bytes


def without_overlap(striped: StripedModel) -> None:
    """From the image at hand on, each exchange and each reduction is waited for where it starts."""
    cut = striped.cut
    wrapped = Wrapped(cut.exchanges, lambda exchange: Exchange(Blocking(exchange.halos), Blocking(exchange.text)))
    striped.cut = replace(cut, exchanges=wrapped)


def without_communication(striped: StripedModel, *, lag: bool = False) -> None:
    """From the image at hand on, nothing is sent: each rank computes as ever, on wrong numbers.

    Args:
        lag: compute as in the stale schedule after its warm-up.
    """
    cut, plan = striped.cut, striped.cut.plan
    above, below = map(len, plan.halos)
    silent = Exchange(NoHalos((above, below), lags=lag), NoReduction())
    join = NoJoin(tuple(map(len, cut.stripes)), striped.group.rank)
    striped.cut = replace(cut, exchanges=Wrapped(cut.exchanges, lambda _: silent), join=join)
