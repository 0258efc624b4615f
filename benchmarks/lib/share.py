"""One rank's share of an image, run alone, and the projection from it to a step of all ranks.

    seconds = share + bytes / bandwidth                          sync: nothing hidden behind computing
    seconds = max(share, bytes / bandwidth) + join / bandwidth   stale: all but the join hidden

The share is a stripe in the middle with zeros for halos; nothing is packed, sent or waited for.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any, cast

import torch
from diffusers import FluxPipeline

from benchmarks.lib.counts import Part, Traffic, Window
from benchmarks.lib.silent import without_communication
from benchmarks.lib.steps import synchronize
from clear_dist import parallelize
from clear_dist.comm.counters import Counters
from clear_dist.comm.group import Group
from clear_dist.comm.halo_exchange import HaloExchange
from clear_dist.comm.process_groups import Transport
from clear_dist.engine.cut import cut_image
from clear_dist.engine.striped import require_striped
from clear_dist.geometry import Rows, plan_halos
from clear_dist.options import Schedule

MESSAGE_ROWS, MESSAGE_SHAPE = 64, (64, 4, 64)
"""Shape of float32 keys and of values, 8 MB together."""


@dataclass(frozen=True)
class AloneAmong:
    """Stand-in for a group: one of `size` ranks; the others do not exist and always agree."""

    rank: int
    size: int
    device: torch.device
    transport: Transport = "nccl"

    @property
    def wire(self) -> torch.device:
        return self.device

    def gather_objects(self, value: Any) -> list[Any]:
        return [value]

    def agree(self, value: bool) -> bool:
        return value

    def equal(self, values: Any) -> bool:
        return True

    def start_equal(self, values: Any) -> Callable[[], bool]:
        return lambda: True


@contextmanager
def on_stripes(
    pipe: FluxPipeline, window: Window, schedule: Schedule, group: Group, **settings: Any
) -> Iterator[FluxPipeline]:
    """Context in which `pipe` is cut over `group`; `settings`: more options of `parallelize`."""
    handle = parallelize(pipe, window=window, schedule=schedule, warmup_steps=0, group=group, **settings)
    try:
        yield pipe
    finally:
        handle.undo()


@contextmanager
def share_of(
    pipe: FluxPipeline, part: Part, schedule: Schedule, text_tokens: int, **settings: Any
) -> Iterator[FluxPipeline]:
    """Context in which `pipe` computes the rank of `part` alone; `settings`: more options of `parallelize`."""
    alone = cast(Group, AloneAmong(part.rank, part.ranks, pipe.transformer.device))
    text = {"text_tokens": "replicated"} if schedule == "stale" else {}
    handle = parallelize(pipe, window=part.window, group=alone, **text, **settings)
    try:
        striped = require_striped(pipe)
        striped.cut = cut_image(
            part.grid, alone, None, striped.settings, text_tokens=text_tokens, clock=None, counters=striped.counters
        )
        without_communication(striped, lag=schedule == "stale")
        yield pipe
    finally:
        handle.undo()


def projected(share_seconds: float, traffic: Traffic, schedule: Schedule, bytes_per_second: float) -> float:
    """Seconds per step by the formulas above."""
    in_layers, join = traffic.in_layers / bytes_per_second, traffic.at_the_end / bytes_per_second
    return (max(share_seconds, in_layers) if schedule == "stale" else share_seconds + in_layers) + join


def measured_bandwidth(pair: Group, repetitions: int = 7) -> float:
    """Bytes per second each way between two ranks that send at once, by the engine's own exchange; both call this."""
    stripes = (Rows(0, MESSAGE_ROWS), Rows(MESSAGE_ROWS, 2 * MESSAGE_ROWS))
    counters = Counters()
    exchange = HaloExchange(pair, plan_halos(stripes, pair.rank, None), counters)
    key = torch.zeros(1, MESSAGE_ROWS, *MESSAGE_SHAPE, device=pair.device)
    seconds = []
    for _ in range(repetitions + 1):
        pair.barrier()
        began = time.perf_counter()
        pending = exchange.start(key, key)
        pending.wait()
        pending.release()
        synchronize(pair.device)
        seconds.append(time.perf_counter() - began)
    exchange.drain()
    return pair.broadcast_object(2 * key.nbytes / median(seconds[1:]))
