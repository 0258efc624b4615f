"""What a person sees while a picture is made: phases, steps and the time left. Rank 0 and terminals only."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

PHASES = {
    "load": "loading",
    "text": "encoding the prompt",
    "denoise": "denoising",
    "decode": "decoding",
    "save": "saving",
}


class Phases:
    """Times the phases of a run, on every rank, and shows them where somebody watches."""

    def __init__(self, progress: Progress | None = None) -> None:
        self.seconds: dict[str, float] = dict.fromkeys(PHASES, 0.0)
        self.seconds_per_step: list[float] = []
        self._progress = progress
        self._task: TaskID | None = None
        self._step_began = 0.0

    @contextmanager
    def phase(self, name: str, *, detail: str = "", steps: int | None = None) -> Iterator[None]:
        """Time what is inside as `name`, one of PHASES; several times add up.

        Args:
            detail: which of several such phases this is; its bar goes when it ends.
            steps: of the bar.
        """
        began = self._step_began = time.perf_counter()
        if self._progress is not None:
            self._task = self._progress.add_task(f"{PHASES[name]}{detail}", total=steps)
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - began
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, total=steps or 1, completed=steps or 1, visible=not detail)

    def end_step(self, done: int) -> None:
        """Called at the end of each denoising step with the number of steps done in this phase."""
        now = time.perf_counter()
        self.seconds_per_step.append(now - self._step_began)
        self._step_began = now
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=done)


@contextmanager
def watched(*, rank: int) -> Iterator[Phases]:
    """Phases with a display on rank 0 if stderr is a terminal, else without one."""
    if rank != 0 or not sys.stderr.isatty():
        yield Phases()
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left:"),
        TimeRemainingColumn(),
    )
    # Results on stdout go through the display only where they would be drawn over it.
    with Progress(*columns, console=Console(stderr=True), redirect_stdout=sys.stdout.isatty()) as progress:
        yield Phases(progress)
