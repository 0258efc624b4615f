"""`--profile`: what is in flight when, as torch's profiler sees it; a trace for each rank, for ui.perfetto.dev.

Besides every operation a trace shows what comm/, engine/ and families/ have labelled: "layer 12", "comm: ..." and
"compute: ...".
"""

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
"""A trace of all steps of FLUX would have hundreds of MB."""
MESSAGES = ("gloo:send", "gloo:recv")
"""Recorded by torch, from when a message was posted until it was waited for."""
MOST_PROCESSES = 100
"""Of one rank, as a trace counts them: the host, and each GPU."""


class Profile:
    """The last steps of a stage on one rank: those of the stale schedule's warm-up are not typical."""

    def __init__(self, file: Path, rank: int, *, steps: int, drain: Callable[[], None]) -> None:
        """
        Args:
            steps: of the stage.
            drain: waits for all messages that are on their way.
        """
        self.steps = min(RECORDED_STEPS, steps)
        """How many are recorded."""
        self._file = file
        self._rank = rank
        self._first = steps - self.steps
        self._last = steps - 1
        self._drain = drain
        self._is_under_way = False
        self._profiler = profile(schedule=self._action)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """The stage is drawn inside; no other."""
        self._profiler.start()
        self._is_under_way = True
        yield  # after a failure it is left running, as messages may be on their way: see below
        self._is_under_way = False
        self._profiler.stop()

    def after_step(self) -> None:
        """Called after each step of any stage."""
        if not self._is_under_way:
            return
        if self._profiler.step_num == self._last:
            # Of a message that was posted while it recorded and is waited for later, torch writes to freed memory.
            self._drain()
        self._profiler.step()

    def write(self) -> None:
        """What was recorded: whole or not at all."""
        with replacing(self._file) as partial, TemporaryDirectory() as folder:
            raw = Path(folder) / "trace.json"
            self._profiler.export_chrome_trace(str(raw))
            text = json.dumps(readable(json.loads(raw.read_bytes()), self._rank)).encode()
            partial.write_bytes(gzip.compress(text) if partial.suffix.lower() == ".gz" else text)

    def _action(self, step: int) -> ProfilerAction:
        """What torch's profiler does in a step, counted from 0."""
        if step == self._last:
            return ProfilerAction.RECORD_AND_SAVE
        if self._first <= step < self._last:
            return ProfilerAction.RECORD
        return ProfilerAction.WARMUP if step == self._first - 1 else ProfilerAction.NONE


def readable(trace: dict[str, Any], rank: int) -> dict[str, Any]:
    """`trace` so that viewers show all of it, and tell ranks apart where several traces are opened as one."""
    processes: dict[int, int] = {}
    events: list[dict[str, Any]] = []
    for event in trace["traceEvents"]:
        if isinstance(event["pid"], str):
            continue  # of the profiler itself
        # Of their own for each rank: process ids of two machines, or GPUs of two ranks, may have one number.
        event["pid"] = processes.setdefault(event["pid"], MOST_PROCESSES * rank + len(processes))
        if event["name"] == "process_name":
            event["args"]["name"] = f"rank {rank}"
        events += _in_flight(event, len(events)) if event["name"] in MESSAGES else [event]
    return trace | {"traceEvents": events}


def _in_flight(message: dict[str, Any], number: int) -> list[dict[str, Any]]:
    """On a row beside the thread's: it outlives the call that posted it, and Perfetto drops what does not nest."""
    both = {name: message[name] for name in ("name", "pid", "tid")} | {"cat": "message", "id2": {"local": number}}
    return [both | {"ph": "b", "ts": message["ts"]}, both | {"ph": "e", "ts": message["ts"] + message["dur"]}]


class CompileTime:
    """Wall time of this process, and how often it compiled; tracing counts, loading from torch's cache too."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.times = 0
        self._began = 0.0

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Count what is compiled inside."""
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
