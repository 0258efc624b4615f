"""Exchanges of attention layers: one for all in the sync schedule, one per layer and pass in the stale one."""

from dataclasses import dataclass
from typing import Literal

from clear_dist.comm.clock import Clock
from clear_dist.comm.counters import Counters
from clear_dist.comm.group import Group
from clear_dist.comm.halo_exchange import HaloExchange, SendBuffers
from clear_dist.comm.stale_exchange import StaleHaloExchange, StaleTextReduce
from clear_dist.comm.text_reduce import TextReduce
from clear_dist.comm.text_shards import TextGather, TextScatter
from clear_dist.engine.pooled_keys import PooledKeys
from clear_dist.engine.settings import Settings
from clear_dist.geometry import HaloPlan, Rows, TextPlan, plan_pooled


@dataclass(frozen=True)
class Exchange:
    """A layer's exchanges: halos, other ranks' text tokens, the text queries' reduction, down-sampled keys."""

    halos: HaloExchange
    gather: TextGather
    text: TextReduce
    pooled: PooledKeys | None = None


@dataclass(eq=False)
class Exchanges:
    """Exchanges of one cut, reused by its generations; stale where there is a clock."""

    _group: Group
    _stripes: tuple[Rows, ...]
    _plan: HaloPlan
    _settings: Settings
    _counters: Counters
    _clock: Clock | None

    def __post_init__(self) -> None:
        layers = 0 if self._clock is None else self._settings.sending_layers
        self._sends, self._pooled_sends = (SendBuffers(self._group, self._counters, layers=layers) for _ in range(2))
        self._made: dict[tuple[int, int, TextPlan], Exchange] = {}

    def of(self, turn: int, layer: int, text: TextPlan) -> Exchange:
        which = (0, 0, text) if self._clock is None else (turn, layer, text)
        if which not in self._made:
            self._made[which] = self._make(text)
        return self._made[which]

    def has_begun(self, turn: int) -> bool:
        return any(made == turn for made, *_ in self._made)

    def drain(self) -> None:
        """Wait for all messages and drop all buffers; all ranks call this."""
        for exchange in self._made.values():
            exchange.halos.drain()
            exchange.gather.drain()
            exchange.text.drain()
            if exchange.pooled is not None:
                exchange.pooled.exchange.drain()
        self._made.clear()

    def abandon(self) -> None:
        """Drop all buffers, and wait for nothing: what a capture that failed has posted was never sent."""
        self.__post_init__()

    @property
    def stale_bytes(self) -> int:
        made = self._made.values() if self._clock is not None else ()
        pooled = sum(exchange.pooled.exchange.received_bytes for exchange in made if exchange.pooled is not None)
        return pooled + sum(exchange.halos.received_bytes + exchange.text.kept_bytes for exchange in made)

    def _make(self, text: TextPlan) -> Exchange:
        pooled, pooling = None, self._settings.pooling
        if pooling is not None:
            plan = plan_pooled(self._stripes, self._group.rank, pooling.factor)
            pooled = PooledKeys(pooling, self._make_rows(plan, self._pooled_sends, "pooled"))
        gather = TextGather(self._group, text, self._counters)
        return Exchange(self._make_rows(self._plan, self._sends, "halo"), gather, self._make_text(text), pooled)

    def _make_rows(self, plan: HaloPlan, sends: SendBuffers, counted_as: Literal["halo", "pooled"]) -> HaloExchange:
        group, counters = self._group, self._counters
        if self._clock is None:
            return HaloExchange(group, plan, counters, sends=sends, counted_as=counted_as)
        return StaleHaloExchange(group, plan, counters, sends=sends, clock=self._clock, counted_as=counted_as)

    def _make_text(self, text: TextPlan) -> TextReduce:
        how = self._group, self._settings.reduction, self._counters
        if self._clock is None:
            return TextScatter(*how, plan=text) if text.is_shared else TextReduce(*how)
        assert not text.is_shared, "nothing of the text is gathered late"
        return StaleTextReduce(*how, clock=self._clock)
