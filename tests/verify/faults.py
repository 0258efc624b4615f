"""Faulty parts to be verified: each does one thing wrong, on one rank only where that can be."""

import os
import signal
import time
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from clear_dist.attention import BACKENDS, Backend
from clear_dist.attention.backend import WindowCall
from clear_dist.comm.halo_exchange import HaloExchange, Halos
from clear_dist.comm.messages import Message, post
from clear_dist.comm.text_reduce import Average, Reduction, TextReduce
from clear_dist.parallelize import parallelize


class RowsInWrongOrder(HaloExchange):
    """On rank 1: the halo's first row comes last."""

    def _finish(self) -> Halos:
        above, below = super()._finish()
        return (above.roll(1, dims=2) if self._group.rank == 1 else above), below


class NothingWritten(HaloExchange):
    """On rank 0: what was received stays where it is."""

    def _finish(self) -> Halos:
        above, below = super()._finish()
        return above, torch.empty_like(below) if self._group.rank == 0 else below


class RowsOfTheExchangeBefore(HaloExchange):
    """Every exchange is stale."""

    def _finish(self) -> Halos:
        halos = super()._finish()
        before = getattr(self, "_before", halos)
        self._before = tuple(halo.clone() for halo in halos)
        return before  # type: ignore[return-value]


class OneRowTooFew(HaloExchange):
    def _finish(self) -> Halos:
        above, below = super()._finish()
        return above[:, :, 1:], below


class KilledInAnExchange(HaloExchange):
    def _finish(self) -> Halos:
        if self._group.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return super()._finish()


class HangsInAnExchange(HaloExchange):
    def _finish(self) -> Halos:
        if self._group.rank == 1:
            time.sleep(1000)
        return super()._finish()


class RaisesInAnExchange(HaloExchange):
    def _finish(self) -> Halos:
        if self._group.rank == 1:
            raise ZeroDivisionError("by nothing")
        return super()._finish()


class ForgetsToWeigh(TextReduce):
    """Rank 1 says that its keys weigh as much as if their scores were all 1 higher."""

    def _begin(self, out_BTND: Tensor, lse_BTN: Tensor) -> Any:
        return super()._begin(out_BTND, lse_BTN + (self.group.rank == 1))


def averages_always(group: Any, reduction: Reduction, counters: Any) -> TextReduce:
    return TextReduce(group, Average(), counters)


class Sums(TextReduce):
    """The mean is not divided by the number of ranks."""

    def _begin(self, out_BTND: Tensor, lse_BTN: Tensor) -> Any:
        return super()._begin(out_BTND if self._reduction.weighs else out_BTND * self.group.size, lse_BTN)


def with_backend(name: str, run: Any) -> dict[str, Backend]:
    return {**BACKENDS, name: replace(BACKENDS[name], run=run)}


def rubbish(call: WindowCall) -> tuple[Tensor, Tensor]:
    out, lse = BACKENDS["reference"].run(call)
    return torch.zeros_like(out), lse


def wider_circle(call: WindowCall) -> tuple[Tensor, Tensor]:
    return BACKENDS["reference"].run(replace(call, radius=call.radius + 1))


def wrong_log_sum_exp(call: WindowCall) -> tuple[Tensor, Tensor]:
    out, lse = BACKENDS["tiled"].run(call)
    return out, lse + 0.01


def not_a_number(call: WindowCall) -> tuple[Tensor, Tensor]:
    out, lse = BACKENDS["tiled"].run(call)
    return out.index_fill(1, torch.tensor([0]), torch.nan), lse


def cannot_be_launched(call: WindowCall) -> tuple[Tensor, Tensor]:
    raise RuntimeError("no kernel image is available\nfor execution")


def parallelize_with_average(pipe: Any, **settings: Any) -> Any:
    return parallelize(pipe, **settings | {"text_attention": None if settings["window"] == "full" else "average"})


def parallelize_without_warmup(pipe: Any, **settings: Any) -> Any:
    return parallelize(
        pipe, **{name: value for name, value in settings.items() if name != "warmup_steps"} | {"warmup_steps": 1}
    )


def parallelize_with_a_window(pipe: Any, **settings: Any) -> Any:
    return parallelize(pipe, **settings | {"window": 4, "text_attention": "exact"})


def post_something_else(group: Any, incoming: list[Message], outgoing: list[Message]) -> Any:
    """Rank 1 sends 100 numbers that are not those it was given."""
    if group.rank == 1:
        ((peer, buffer),) = outgoing
        changed = buffer.clone()
        changed[:100] = -1.0
        outgoing = [(peer, changed)]
    return post(group, incoming, outgoing)


def post_slowly(group: Any, incoming: list[Message], outgoing: list[Message]) -> Any:
    """5 MB/s."""
    time.sleep(outgoing[0][1].nbytes / 5e6)
    return post(group, incoming, outgoing)
