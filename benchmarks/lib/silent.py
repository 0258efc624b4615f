"""Stand-ins for an image's exchanges: steps without overlap, and steps without any communication."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from clear_dist.comm.halo_exchange import HaloExchange, Halos
from clear_dist.comm.text_reduce import TextReduce
from clear_dist.comm.text_shards import TextGather
from clear_dist.engine.exchanges import Exchange, Exchanges
from clear_dist.engine.striped import StripedModel
from clear_dist.geometry import TextPlan


@dataclass(frozen=True)
class Done:
    """A pending exchange whose result is there already."""

    result: Any
    lag: bool = False
    release: Callable[[], None] = lambda: None

    def wait(self) -> Any:
        return self.result


@dataclass(frozen=True)
class Reduced:
    """A pending reduction whose result is there already."""

    result: Tensor

    def wait(self, into: Tensor) -> Tensor:
        return into.copy_(self.result)


@dataclass(frozen=True)
class Blocking:
    """An exchange that is waited for where it starts."""

    inner: HaloExchange
    lags: bool = False

    def start(self, *tensors: Tensor) -> Done:
        return Done(self.inner.start(*tensors).wait())


@dataclass(frozen=True)
class BlockingReduction:
    """A reduction that is waited for where it starts."""

    inner: TextReduce
    plan: TextPlan

    def start(self, out_BTND: Tensor, lse_BTN: Tensor) -> Reduced:
        return Reduced(self.inner.start(out_BTND, lse_BTN).wait(torch.empty_like(out_BTND[:, self.plan.elsewhere :])))


@dataclass(frozen=True)
class BlockingGather:
    """A gathering of text that is waited for where it starts."""

    inner: TextGather

    @property
    def plan(self) -> TextPlan:
        return self.inner.plan

    def start(self, *tensors_BLND: Tensor) -> None:
        self.inner.start(*tensors_BLND)
        self.inner.wait()

    def wait(self) -> None:
        pass


@dataclass(frozen=True)
class NoHalos:
    """Halos of zeros."""

    rows: tuple[int, int]
    """Number of rows above and below."""
    lags: bool = False
    """Whether they count as the previous step's."""

    def start(self, key_BRWND: Tensor, value_BRWND: Tensor) -> Done:
        batch, _, *row = key_BRWND.shape
        above, below = (key_BRWND.new_zeros(2, batch, rows, *row) for rows in self.rows)
        halos: Halos = above, below
        return Done(halos, lag=self.lags)


@dataclass(frozen=True)
class NoGather:
    """Zeros in place of other ranks' text tokens."""

    plan: TextPlan

    def start(self, *tensors_BLND: Tensor) -> None:
        for x in tensors_BLND:
            x[:, : self.plan.elsewhere].zero_()

    def wait(self) -> None:
        pass


@dataclass(frozen=True)
class NoReduction:
    """This rank's part in place of the sum over ranks."""

    plan: TextPlan

    def start(self, out_BTND: Tensor, lse_BTN: Tensor) -> Reduced:
        return Reduced(out_BTND[:, self.plan.elsewhere :])


@dataclass(frozen=True)
class NoJoin:
    """Zeros in place of other ranks' stripes."""

    stripes: tuple[int, ...]
    rank: int

    def join(self, local: Tensor) -> Tensor:
        row_tokens = local.shape[1] // self.stripes[self.rank]
        parts = [local.new_zeros(len(local), rows * row_tokens, local.shape[2]) for rows in self.stripes]
        parts[self.rank] = local
        return torch.cat(parts, dim=1)


@dataclass(frozen=True)
class Wrapped:
    """An image's exchanges, each passed through `wrap`."""

    exchanges: Exchanges
    wrap: Callable[[Exchange], Exchange]

    def of(self, turn: int, layer: int, text: TextPlan, *, has_pooled: bool = True) -> Exchange:
        return self.wrap(self.exchanges.of(turn, layer, text, has_pooled=has_pooled))

    def fit(self, batch: int) -> bool:
        return self.exchanges.fit(batch)

    def has_begun(self, turn: int) -> bool:
        return self.exchanges.has_begun(turn)

    def drain(self) -> None:
        self.exchanges.drain()

    @property
    def stale_bytes(self) -> int:
        return self.exchanges.stale_bytes


def without_overlap(striped: StripedModel) -> None:
    """Make the current image wait for each exchange and reduction where it starts."""

    def blocking(exchange: Exchange) -> Exchange:
        text = BlockingReduction(exchange.text, exchange.gather.plan)
        return Exchange(Blocking(exchange.halos), BlockingGather(exchange.gather), text)

    striped.cut = replace(striped.cut, exchanges=Wrapped(striped.cut.exchanges, blocking))


def without_communication(striped: StripedModel, *, lag: bool = False) -> None:
    """Make the current image send nothing: each rank computes as usual, on wrong numbers.

    Args:
        lag: compute as in the stale schedule after its warm-up.
    """
    cut, plan = striped.cut, striped.cut.plan
    above, below = map(len, plan.halos)

    def silent(exchange: Exchange) -> Exchange:
        text = exchange.gather.plan
        return Exchange(NoHalos((above, below), lags=lag), NoGather(text), NoReduction(text))

    join = NoJoin(tuple(map(len, cut.stripes)), striped.group.rank)
    striped.cut = replace(cut, exchanges=Wrapped(cut.exchanges, silent), join=join)
