"""The stale schedule: a layer uses what was sent during the step before, and sends its own for the next.

So each layer in each pass of a step has an exchange and a reduction of its own; where they hold nothing from the step
before, they act as their parents. Shapes: as in halo_exchange.py and text_reduce.py.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from clear_dist.comm.clock import Clock
from clear_dist.comm.counters import Counters
from clear_dist.comm.group import Group
from clear_dist.comm.halo_exchange import HaloExchange, PendingHalos
from clear_dist.comm.text_reduce import Reduction, TextReduce


@dataclass(eq=False, kw_only=True)
class StaleHaloExchange(HaloExchange):
    """Halos of one layer in one pass; all layers share `sends`."""

    clock: Clock
    _step_held: int | None = None

    @property
    def lags(self) -> bool:
        return self.clock.may_lag(self._step_held)

    def _begin(self, key_BRWND: torch.Tensor, value_BRWND: torch.Tensor) -> PendingHalos:
        lag = self.lags
        self._step_held = self.clock.step
        if lag:
            # Mine leave, and theirs arrive, once the old ones were read: so one buffer is enough.
            return PendingHalos(self, lag=True, on_release=lambda: self._post(key_BRWND, value_BRWND))
        self._wait_for_arrivals()
        return super()._begin(key_BRWND, value_BRWND)


class StaleTextReduce(TextReduce):
    """Text reduction of one layer in one pass; it lags on all ranks alike, so text tokens stay equal."""

    def __init__(self, group: Group, reduction: Reduction, counters: Counters, *, clock: Clock) -> None:
        super().__init__(group, reduction, counters)
        self._clock = clock
        self._step_held: int | None = None

    def _begin(self, out_BTND: torch.Tensor, lse_BTN: torch.Tensor) -> Callable[[torch.Tensor], object]:
        lag = self._clock.may_lag(self._step_held)
        self._step_held = self._clock.step
        self.drain()
        if not lag:
            return super()._begin(out_BTND, lse_BTN)
        before_BTND = self._reduction.post_late(self, out_BTND, lse_BTN)
        return lambda into_BTND: into_BTND.copy_(before_BTND)
