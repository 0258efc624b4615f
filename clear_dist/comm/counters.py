"""Bytes sent and seconds waited by one rank in each denoising step; labels for profiles."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch.autograd import _profiler_enabled
from torch.profiler import record_function

AMOUNTS = (
    "halo_bytes_sent", "halo_messages_sent", "pooled_bytes_sent", "pooled_messages_sent", "text_bytes_gathered",
    "text_bytes_reduced", "join_bytes", "other_bytes", "weight_bytes_sent",
)  # fmt: skip


class Counters:
    """Bytes handed over and seconds waited in each step; bytes between steps count in the step before, if any."""

    def __init__(self) -> None:
        self._steps = [_Step()]
        self._steps_begun = 0
        self._paused = True

    def add(self, name: str, amount: int) -> None:
        """Add bytes or messages to one of AMOUNTS in the current step."""
        assert name in AMOUNTS, name
        self._steps[-1].amounts[name] += amount

    @contextmanager
    def waiting(self, label: str, wire: torch.device) -> Iterator[None]:
        """Time the waits inside: wall time, or on CUDA (`wire`) the time that the current stream stands still."""
        with labelled(label):
            if self._paused:
                yield
            elif wire.type == "cuda":
                # Events are read after the step: reading them here would make the host wait for the GPU in each layer.
                before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                before.record()
                yield
                after.record()
                self._steps[-1].events.append((before, after))
            else:
                began = time.perf_counter()
                yield
                self._steps[-1].seconds += time.perf_counter() - began

    def begin_step(self) -> None:
        if self._steps_begun:
            self._steps.append(_Step())
        self._steps_begun += 1
        self._paused = False
        if self._steps_begun > 2:
            # Long done on the GPU, so that reading its events holds nothing up; kept, they would pile up.
            self._steps[-3].seconds_waiting()

    def pause(self) -> None:
        """Time no waits until `resume` or `begin_step`."""
        self._paused = True

    def resume(self) -> None:
        self._paused = False

    @contextmanager
    def apart(self) -> Iterator[dict[str, int]]:
        """Context whose amounts are in the dict that it gives, and not in the current step; no waits are timed."""
        step, paused = self._steps[-1], self._paused
        apart = _Step()
        self._steps[-1], self._paused = apart, True
        try:
            yield apart.amounts
        finally:
            self._steps[-1], self._paused = step, paused

    def as_dict(self) -> dict[str, list[int] | list[float]]:
        """One list per name with an entry per step, waits in seconds; blocks until the GPU's events are over."""
        steps = self._steps[: self._steps_begun]
        amounts: dict[str, list[int] | list[float]] = {name: [step.amounts[name] for step in steps] for name in AMOUNTS}
        return amounts | {"seconds_waiting": [step.seconds_waiting() for step in steps]}


@dataclass
class _Step:
    amounts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(AMOUNTS, 0))
    seconds: float = 0.0
    events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = field(default_factory=list)

    def seconds_waiting(self) -> float:
        for before, after in self.events:
            after.synchronize()
            self.seconds += before.elapsed_time(after) / 1e3
        self.events.clear()
        return self.seconds


@contextmanager
def labelled(label: str) -> Iterator[None]:
    """torch's `record_function`, around a block or a function; free where no profiler runs."""
    if _profiler_enabled():
        with record_function(label):
            yield
    else:
        yield
