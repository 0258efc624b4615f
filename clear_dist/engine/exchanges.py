"""Exchanges of attention layers: one for all in the sync schedule, one per layer and pass in the stale one."""

from dataclasses import dataclass
from typing import Literal

from clear_dist.comm.clock import Clock
from clear_dist.comm.counters import Counters
from clear_dist.comm.group import Group
from clear_dist.comm.halo_exchange import HaloExchange, SendBuffers
from clear_dist.comm.stale_exchange import StaleHaloExchange, StaleTextReduce
from clear_dist.comm.text_copies import TextCopies
from clear_dist.comm.text_reduce import TextReduce
from clear_dist.comm.text_shards import TextGather, TextScatter
from clear_dist.engine.pooled_keys import PooledKeys
from clear_dist.engine.settings import Settings
from clear_dist.geometry import CopiedText, HaloPlan, Rows, TextPlan, plan_pooled

Where = tuple[int, int]
"""Pass and layer."""


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
        self._halos: dict[Where, HaloExchange] = {}
        self._pooled: dict[Where, PooledKeys] = {}
        self._texts: dict[tuple[Where, TextPlan], tuple[TextGather, TextReduce]] = {}

    def of(self, turn: int, layer: int, text: TextPlan, *, has_pooled: bool = True) -> Exchange:
        where = (0, 0) if self._clock is None else (turn, layer)
        if where not in self._halos:
            self._halos[where] = self._make_rows(self._plan, self._sends, "halo")
        if (where, text) not in self._texts:
            self._texts[where, text] = TextGather(self._group, text, self._counters), self._make_text(text)
        pooling = self._settings.pooling if has_pooled else None
        if pooling is not None and where not in self._pooled:
            plan = plan_pooled(self._stripes, self._group.rank, pooling.factor)
            self._pooled[where] = PooledKeys(pooling, self._make_rows(plan, self._pooled_sends, "pooled"))
        pooled = None if pooling is None else self._pooled[where]
        return Exchange(self._halos[where], *self._texts[where, text], pooled)

    def has_begun(self, turn: int) -> bool:
        return any(made == turn for made, _ in self._halos)

    def fit(self, batch: int) -> bool:
        """Whether halos that are held, if any, are of `batch` pictures."""
        return all(halos.batch in (batch, None) for halos in self._halos.values())

    def drain(self) -> None:
        """Wait for all messages and drop all buffers; all ranks call this."""
        rows = *self._halos.values(), *(pooled.exchange for pooled in self._pooled.values())
        for row in rows:
            row.drain()
        for gather, text in self._texts.values():
            gather.drain()
            text.drain()
        for made in (self._halos, self._pooled, self._texts):
            made.clear()

    def abandon(self) -> None:
        """Drop all buffers, and wait for nothing: what a capture that failed has posted was never sent."""
        self.__post_init__()

    @property
    def stale_bytes(self) -> int:
        if self._clock is None:
            return 0
        rows = *self._halos.values(), *(pooled.exchange for pooled in self._pooled.values())
        return sum(each.received_bytes for each in rows) + sum(text.kept_bytes for _, text in self._texts.values())

    def _make_rows(self, plan: HaloPlan, sends: SendBuffers, counted_as: Literal["halo", "pooled"]) -> HaloExchange:
        group, counters = self._group, self._counters
        if self._clock is None:
            return HaloExchange(group, plan, counters, sends=sends, counted_as=counted_as)
        return StaleHaloExchange(group, plan, counters, sends=sends, clock=self._clock, counted_as=counted_as)

    def _make_text(self, text: TextPlan) -> TextReduce:
        how = self._group, self._settings.reduction, self._counters
        if isinstance(text, CopiedText):
            return TextCopies(*how, plan=text)
        if self._clock is None:
            return TextScatter(*how, plan=text) if text.is_shared else TextReduce(*how)
        assert not text.is_shared, "nothing of the text is gathered late"
        return StaleTextReduce(*how, clock=self._clock)
