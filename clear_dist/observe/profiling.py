"""`--profile`: a labelled trace of torch's profiler for each rank, for ui.perfetto.dev; and the time of compilation."""

import gzip
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch._dynamo.callback import CallbackArgs, callback_handler
from torch.profiler import ProfilerAction, profile

from clear_dist.pictures import replacing

RECORDED_STEPS = 3
"""A trace of all 28 steps of 57 blocks would have hundreds of MB."""
MESSAGES = ("gloo:send", "gloo:recv")
"""Recorded by torch from posting a message to waiting for it."""
MOST_PROCESSES = 100
"""Limit of a rank's processes in a trace: the host, and each GPU."""


class Profile:
    """The last steps of a stage on one rank: those of the stale schedule's warm-up are not typical."""

    def __init__(self, file: Path, rank: int, *, steps: int, drain: Callable[[], None]) -> None:
        """`steps`: those of the stage; `drain` waits for all messages that are on their way."""
        self.steps = min(RECORDED_STEPS, steps)
        self._file = file
        self._rank = rank
        self._first = steps - self.steps
        self._last = steps - 1
        self._drain = drain
        self._is_under_way = False
        self._profiler = profile(schedule=self._action)

    @contextmanager
    def recording(self) -> Iterator[None]:
        self._profiler.start()
        self._is_under_way = True
        yield  # after a failure it is left running, as messages may be on their way: see below
        self._is_under_way = False
        self._profiler.stop()

    def after_step(self) -> None:
        if not self._is_under_way:
            return
        if self._profiler.step_num == self._last:
            # Torch writes to freed memory for a message that is posted while it records and waited for later.
            self._drain()
        self._profiler.step()

    def write(self) -> None:
        with replacing(self._file) as partial, TemporaryDirectory() as folder:
            raw = Path(folder) / "trace.json"
            self._profiler.export_chrome_trace(str(raw))
            text = json.dumps(readable(json.loads(raw.read_bytes()), self._rank)).encode()
            partial.write_bytes(gzip.compress(text) if partial.suffix.lower() == ".gz" else text)

    def _action(self, step: int) -> ProfilerAction:
        if step == self._last:
            return ProfilerAction.RECORD_AND_SAVE
        if self._first <= step < self._last:
            return ProfilerAction.RECORD
        return ProfilerAction.WARMUP if step == self._first - 1 else ProfilerAction.NONE


def readable(trace: dict[str, Any], rank: int) -> dict[str, Any]:
    """`trace` changed so that viewers show all of it, and tell ranks apart."""
    processes: dict[int, int] = {}
    events: list[dict[str, Any]] = []
    for event in trace["traceEvents"]:
        if isinstance(event["pid"], str):
            continue  # the profiler itself
        # Numbers of each rank's own: process ids of two machines, or GPUs of two ranks, may be equal.
        event["pid"] = processes.setdefault(event["pid"], MOST_PROCESSES * rank + len(processes))
        if event["name"] == "process_name":
            event["args"]["name"] = f"rank {rank}"
        events += _in_flight(event, len(events)) if event["name"] in MESSAGES else [event]
    return trace | {"traceEvents": events}


def _in_flight(message: dict[str, Any], number: int) -> list[dict[str, Any]]:
    """A message on a row beside the thread's: it outlives its call, and Perfetto drops what does not nest."""
    both = {name: message[name] for name in ("name", "pid", "tid")} | {"cat": "message", "id2": {"local": number}}
    return [both | {"ph": "b", "ts": message["ts"]}, both | {"ph": "e", "ts": message["ts"] + message["dur"]}]


class CompileTime:
    """Wall time and number of compilations in this process, with tracing and loading from torch's cache."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.times = 0
        self._began = 0.0

    @contextmanager
    def measuring(self) -> Iterator[None]:
        callback_handler.register_start_callback(self._start)
        callback_handler.register_end_callback(self._end)
        try:
            yield
        finally:
            callback_handler.remove_start_callback(self._start)
            callback_handler.remove_end_callback(self._end)

    def _start(self, _: CallbackArgs) -> None:
        self._began = time.perf_counter()

    def _end(self, _: CallbackArgs) -> None:
        self.seconds += time.perf_counter() - self._began
        self.times += 1
