"""Progress while a picture is made: stages, phases, steps and the time left; shown by rank 0, in a log line by line."""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text

PHASES = {
    "load": "loading",
    "text": "encoding the prompt",
    "encode": "encoding",
    "denoise": "denoising",
    "decode": "decoding",
    "save": "saving",
}
WHOLE = "all in all"
SECONDS_BETWEEN_LINES = 30.0

Say = Callable[[str], None]
Add = Callable[[float], float]


@dataclass
class Times:
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    seconds_per_step: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class LoadedPart:
    name: str
    nbytes: int
    seconds: float


class Phases:
    """Timer of a run's phases, on every rank, with a display where somebody watches."""

    def __init__(self, progress: Progress | None = None, begin: Say = lambda line: None) -> None:
        """`begin` is told of each stage that begins to be denoised."""
        self._begin = begin
        self.times = Times()
        self.stages: list[Times] = []
        self.parts: list[LoadedPart] = []
        self._progress = progress
        self._whole: TaskID | None = None
        self._task: TaskID | None = None
        self._work_per_step = 0.0
        self._step_began = 0.0
        self._done = 0.0
        self._add: Add = self._alone

    def expect(self, work: float, add: Add | None = None) -> None:
        """Set the whole run's work, in any unit; `add` adds to what has been done of it, and returns that."""
        self._add = add or self._alone
        if self._progress is not None:
            self._whole = self._progress.add_task(WHOLE, total=work, shown="", known_at=0.0)

    def begin_stage(self) -> None:
        self.stages.append(Times())

    @contextmanager
    def phase(self, name: str, *, detail: str = "", steps: int | None = None, work: float = 0.0) -> Iterator[None]:
        """Time the body as `name`, one of PHASES, which add up; `steps` is the bar's length, `work` its share."""
        began = self._step_began = time.perf_counter()
        self._work_per_step = work / (steps or 1)
        if self._progress is not None:
            shown = f"0/{steps}" if steps else ""
            self._task = self._progress.add_task(f"{PHASES[name]}{detail}", total=steps, shown=shown)
            if steps:
                self._begin(line_of(self._progress))
        try:
            yield
        finally:
            seconds = time.perf_counter() - began
            for times in (self.times, *self.stages[-1:]):
                times.seconds[name] += seconds
        if not steps:
            self._advance()
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, total=steps or 1, completed=steps or 1, visible=not detail)

    @contextmanager
    def loading(self, part: str, nbytes: int) -> Iterator[Callable[[int], None]]:
        """Time the loading of a part inside a phase; yields a function to be told of bytes as they come."""
        began, done, progress = time.perf_counter(), 0, self._progress
        size, bar = f"{nbytes / 1e9:.1f} GB", None
        if progress is not None:
            bar = progress.add_task(f"  {part}", total=nbytes, shown=size, known_at=0.0)

        def advance(count: int) -> None:
            nonlocal done
            done += count
            if progress is not None and bar is not None:
                seconds = time.perf_counter() - began
                shown = f"{done / 1e9:.1f}/{size}, {done / 1e9 / seconds:.1f} GB/s"
                progress.update(bar, completed=done, known_at=seconds, shown=shown)

        yield advance
        self.parts.append(LoadedPart(part, nbytes, time.perf_counter() - began))
        if progress is not None and bar is not None:
            progress.update(bar, completed=nbytes, visible=False)

    def end_step(self, done: int) -> None:
        """Note the end of a denoising step, `done` being the steps of this phase so far."""
        now = time.perf_counter()
        for times in (self.times, *self.stages[-1:]):
            times.seconds_per_step.append(now - self._step_began)
        self._step_began = now
        self._advance()
        if self._progress is not None and self._task is not None:
            total = self._progress.tasks[self._progress.task_ids.index(self._task)].total
            self._progress.update(self._task, completed=done, shown=f"{done}/{total:g}")

    def skip(self, work: float) -> None:
        """Note work of the whole run that has been done before."""
        self._show(self._add(work))

    def look(self) -> None:
        """Show what others have done of the whole run's work meanwhile."""
        self._show(self._add(0.0))

    def _advance(self) -> None:
        self._show(self._add(self._work_per_step))

    def _alone(self, work: float) -> float:
        self._done += work
        return self._done

    def _show(self, done: float) -> None:
        if self._progress is not None and self._whole is not None:
            task = self._progress.tasks[self._progress.task_ids.index(self._whole)]
            self._progress.update(self._whole, completed=done, known_at=task.elapsed or 0.0)
            self._progress.update(self._whole, shown=f"{task.percentage:.0f} %")


class TimeLeft(ProgressColumn):
    """Time left by the work done so far; counts down between steps, which may take minutes."""

    def render(self, task: Task) -> Text:
        known_at = task.fields.get("known_at")
        if known_at is None or task.finished:
            return Text("")
        if not task.completed or not task.total:
            return Text("left: -:--:--")
        left = known_at * (task.total / task.completed - 1) - ((task.elapsed or 0.0) - known_at)
        return Text(f"left: {timedelta(seconds=max(0, round(left)))}")


def line_of(progress: Progress) -> str:
    """What is being done, and how much of all is."""
    doing = [task for task in progress.tasks if not task.finished and (task.completed or task.description != WHOLE)]
    lines = []
    for task in sorted(doing, key=lambda task: task.description == WHOLE):
        known = ", ".join(filter(None, (task.fields["shown"], TimeLeft().render(task).plain)))
        lines.append(task.description.strip() + f": {known}" * bool(known))
    return "; ".join(lines)


@contextmanager
def logged(progress: Progress, say: Say) -> Iterator[None]:
    """Have a thread say every 30 s what is being done."""
    ended = threading.Event()

    def tell() -> None:
        while not ended.wait(SECONDS_BETWEEN_LINES):
            say(line_of(progress))

    threading.Thread(target=tell, daemon=True).start()
    try:
        yield
    finally:
        ended.set()


@contextmanager
def watched(*, rank: int, say: Say, quiet: bool = False) -> Iterator[Phases]:
    """Phases with a display on rank 0, lines where stderr is no terminal; with none on others, or if `quiet`."""
    if rank != 0 or quiet:
        yield Phases()
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[shown]}"),
        TimeElapsedColumn(),
        TimeLeft(),
    )
    # Results on stdout go through the display only where they would be drawn over it.
    progress = Progress(*columns, console=Console(stderr=True), redirect_stdout=sys.stdout.isatty())
    if sys.stderr.isatty():
        with progress:
            yield Phases(progress)
    else:
        with logged(progress, say):
            yield Phases(progress, say)
