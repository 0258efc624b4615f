"""How long torch.compile works, on all that a run compiles: FlexAttention's kernels too."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from torch._dynamo.callback import CallbackArgs, callback_handler


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
