"""Phases: what is timed, and what a person sees of it."""

import io
import sys
import threading
from types import SimpleNamespace

import pytest
from rich.console import Console
from rich.progress import Progress, Task

from clear_dist.observe import progress as observed
from clear_dist.observe.progress import Phases, TimeLeft, line_of, watched


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """It stands still but for what is added to `now`, in seconds."""
    hand = SimpleNamespace(now=100.0)
    monkeypatch.setattr(observed, "time", SimpleNamespace(perf_counter=lambda: hand.now))
    return hand


def test_phases_add_up_over_stages(clock: SimpleNamespace) -> None:
    phases = Phases()
    with phases.phase("text"):
        clock.now += 0.5
    for pauses in ((2.0,), (1.0, 3.0)):
        phases.begin_stage()
        with phases.phase("denoise", steps=len(pauses)):
            for done, pause in enumerate(pauses, start=1):
                clock.now += pause
                phases.end_step(done)
    first, second = phases.stages
    assert (first.seconds_per_step, second.seconds_per_step) == ([2.0], [1.0, 3.0])
    assert phases.times.seconds_per_step == [2.0, 1.0, 3.0]
    assert (first.seconds["text"], phases.times.seconds["text"]) == (0.0, 0.5)
    assert (first.seconds["denoise"], second.seconds["denoise"], phases.times.seconds["denoise"]) == (2.0, 4.0, 6.0)


def test_a_phase_that_fails_is_timed_too(clock: SimpleNamespace) -> None:
    phases = Phases()

    def fail() -> None:
        clock.now += 2.0
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), phases.phase("decode"):
        fail()
    assert phases.times.seconds["decode"] == 2.0


def test_stages_steps_and_the_whole_are_shown() -> None:
    screen = io.StringIO()
    progress = Progress(
        "{task.description}", "{task.fields[shown]}", TimeLeft(), console=Console(file=screen, width=120)
    )
    phases = Phases(progress)
    phases.expect(work=10.0)
    with phases.phase("denoise", detail=", stage 2 of 3", steps=4, work=8.0):
        phases.end_step(1)
        shown = [(task.description, task.fields["shown"]) for task in progress.tasks]
        assert shown == [("all in all", "20 %"), ("denoising, stage 2 of 3", "1/4")]
    with phases.phase("decode", work=2.0):
        pass
    assert progress.tasks[0].completed == 4.0


def test_gigabytes_and_their_rate_are_shown_while_loading(clock: SimpleNamespace) -> None:
    columns = ("{task.description}", "{task.fields[shown]}", TimeLeft())
    progress = Progress(*columns, console=Console(file=io.StringIO()), get_time=lambda: clock.now)
    phases = Phases(progress)
    with phases.phase("load", detail=" the model"), phases.loading("transformer", 4_000_000_000) as advance:
        clock.now += 2.0
        advance(1_000_000_000)
        task = progress.tasks[1]
        assert (task.description, task.fields["shown"]) == ("  transformer", "1.0/4.0 GB, 0.5 GB/s")
        assert str(TimeLeft().render(task)) == "left: 0:00:06"
    assert not progress.tasks[0].visible and not progress.tasks[1].visible
    (part,) = phases.parts
    assert (part.name, part.nbytes, part.seconds) == ("transformer", 4_000_000_000, 2.0)


def test_the_time_left_follows_from_the_work_done_and_counts_down() -> None:
    now = 0.0
    progress = Progress(get_time=lambda: now)
    task_id = progress.add_task("x", total=100.0, shown="", known_at=0.0)
    column = TimeLeft()

    def left() -> str:
        task: Task = progress.tasks[progress.task_ids.index(task_id)]
        return column.render(task).plain

    assert left() == "left: -:--:--"
    now = 60.0
    progress.update(task_id, advance=25.0, known_at=now)
    assert left() == "left: 0:03:00"
    now = 90.0
    assert left() == "left: 0:02:30"
    now = 1000.0
    assert left() == "left: 0:00:00"
    progress.update(task_id, completed=100.0)
    assert left() == ""


def test_a_log_has_a_line_for_each_stage_and_of_what_is_done(clock: SimpleNamespace) -> None:
    said: list[str] = []
    progress = Progress(console=Console(file=io.StringIO()), get_time=lambda: clock.now)
    phases = Phases(progress, said.append)
    with phases.phase("load", detail=" the model"), phases.loading("transformer", 4_000_000_000) as advance:
        clock.now += 2.0
        advance(1_000_000_000)
        assert line_of(progress) == "loading the model; transformer: 1.0/4.0 GB, 0.5 GB/s, left: 0:00:06"
    phases.expect(work=100.0)
    for number in (1, 2):
        with phases.phase("denoise", detail=f", stage {number} of 2", steps=4, work=40.0):
            clock.now += 20.0
            phases.end_step(1)
        with phases.phase("decode", work=10.0):
            assert line_of(progress).startswith("decoding; all in all: ")
    assert said == ["denoising, stage 1 of 2: 0/4", "denoising, stage 2 of 2: 0/4; all in all: 20 %, left: 0:01:20"]


def test_lines_come_while_nothing_else_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(observed, "SECONDS_BETWEEN_LINES", 0.01)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    told, said = threading.Event(), []

    def say(line: str) -> None:
        said.append(line)
        told.set()

    with watched(rank=0, say=say) as phases, phases.phase("decode"):
        assert told.wait(60)
    assert set(said) == {"decoding"}


@pytest.mark.parametrize(("rank", "quiet"), [(1, False), (0, True)])
def test_other_ranks_and_quiet_ones_say_nothing(rank: int, quiet: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(observed, "SECONDS_BETWEEN_LINES", 0.01)
    said: list[str] = []
    with watched(rank=rank, say=said.append, quiet=quiet) as phases, phases.phase("denoise", steps=1):
        phases.end_step(1)
    assert said == []
