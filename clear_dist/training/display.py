"""What rank 0 shows of a training: losses, rate, samples per second, time left, memory; lines where nobody watches."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from rich.console import Console, Group
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn

from clear_dist.launch.ends import say
from clear_dist.observe.peaks import peak_memory
from clear_dist.observe.progress import SECONDS_BETWEEN_LINES
from clear_dist.training.trainer import Figures


class Display:
    def __init__(
        self, progress: Progress | None, *, steps: int, done: int, pictures: int, device: torch.device
    ) -> None:
        """`pictures` of an update, on all ranks; `done` updates were taken by earlier runs."""
        self._progress, self._pictures, self._device = progress, pictures, device
        self._steps, self._spoke = steps, time.monotonic()
        self._task = progress.add_task("training", total=steps, completed=done, shown="") if progress else None

    def show(self, figures: Figures) -> None:
        shown = (
            f"loss {figures.total:.4f} (flow {figures.flow:.4f}, prediction {figures.prediction:.4f}, attention "
            f"{figures.attention:.4f}), rate {figures.rate:.2e}, {self._pictures / figures.seconds:.2f} pictures/s, "
            f"{peak_memory(self._device) / 1e9:.1f} GB"
        )
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=figures.step, shown=shown)
        elif time.monotonic() - self._spoke > SECONDS_BETWEEN_LINES or figures.step == self._steps:
            self._spoke = time.monotonic()
            say(f"{figures.step}/{self._steps}: {shown}")


class _WithFigures(Progress):
    """A bar, and below it the figures, which are longer than what it leaves of a line."""

    def get_renderable(self) -> Group:
        return Group(super().get_renderable(), *(task.fields["shown"] for task in self.tasks))


@contextmanager
def displayed(rank: int) -> Iterator[Progress | None]:
    """A live display on rank 0 where stderr is a terminal; None elsewhere."""
    if rank != 0 or not sys.stderr.isatty():
        yield None
        return
    columns = (
        MofNCompleteColumn(),
        BarColumn(bar_width=20),
        TimeElapsedColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    with _WithFigures(*columns, console=Console(stderr=True), redirect_stdout=sys.stdout.isatty()) as progress:
        yield progress
