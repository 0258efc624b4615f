"""What layers exchange through: one after the other in the sync schedule, each with its own in the stale one."""

from dataclasses import dataclass

from clear_dist.clock import Clock
from clear_dist.comm.counters import Counters
from clear_dist.comm.group import Group
from clear_dist.comm.halo_exchange import HaloExchange
from clear_dist.comm.send_buffers import SendBuffers
from clear_dist.comm.stale_exchange import StaleHaloExchange, StaleTextReduce
from clear_dist.comm.text_reduce import TextAttention, TextReduce
from clear_dist.comm.text_shards import TextGather, TextScatter
from clear_dist.geometry import HaloPlan, TextPlan
from clear_dist.models.room import SENDING_LAYERS


@dataclass(frozen=True)
class Exchange:
    """A layer's halos, its text tokens that other ranks have, and the reduction of its text queries."""

    halos: HaloExchange
    gather: TextGather
    text: TextReduce


class Exchanges:
    """Those of one cut, for one generation after another."""

    def __init__(
        self, group: Group, plan: HaloPlan, text_attention: TextAttention, counters: Counters, *, clock: Clock | None
    ) -> None:
        """
        Args:
            clock: what the stale schedule goes by; None: the sync schedule.
        """
        self._group = group
        self._plan = plan
        self._text_attention = text_attention
        self._counters = counters
        self._clock = clock
        self._sends = SendBuffers(group, counters, layers=0 if clock is None else SENDING_LAYERS)
        self._made: dict[tuple[int, int, TextPlan], Exchange] = {}

    def of(self, turn: int, layer: int, text: TextPlan) -> Exchange:
        """That of a layer in one pass of a step."""
        which = (0, 0, text) if self._clock is None else (turn, layer, text)
        if which not in self._made:
            self._made[which] = self._make(text)
        return self._made[which]

    def has_begun(self, turn: int) -> bool:
        """Whether there are buffers for this pass."""
        return any(made == turn for made, *_ in self._made)

    def drain(self) -> None:
        """Wait for what is on its way, and keep nothing of it; all ranks call this."""
        for exchange in self._made.values():
            exchange.halos.drain()
            exchange.gather.drain()
            exchange.text.drain()
        self._made.clear()

    @property
    def stale_bytes(self) -> int:
        """Of what is kept from one step to the next."""
        made = self._made.values() if self._clock is not None else ()
        return sum(exchange.halos.received_bytes + exchange.text.kept_bytes for exchange in made)

    def _make(self, text: TextPlan) -> Exchange:
        group, mode, counters = self._group, self._text_attention, self._counters
        gather = TextGather(group, text, counters)
        if self._clock is None:
            halos = HaloExchange(group, self._plan, counters, sends=self._sends)
            scatter = TextScatter(group, text, mode, counters) if text.is_shared else TextReduce(group, mode, counters)
            return Exchange(halos, gather, scatter)
        assert not text.is_shared, "nothing of the text is gathered late"
        late_halos = StaleHaloExchange(group, self._plan, counters, sends=self._sends, clock=self._clock)
        return Exchange(late_halos, gather, StaleTextReduce(group, mode, counters, clock=self._clock))
