"""Phases: what is timed, and what a person sees of it."""

import io
import time

import pytest
from rich.console import Console
from rich.progress import Progress, Task

from clear_dist.observe.progress import Phases, TimeLeft


def test_phases_add_up_over_stages() -> None:
    phases = Phases()
    with phases.phase("text"):
        pass
    for pauses in ((0.02,), (0.01, 0.03)):
        phases.begin_stage()
        with phases.phase("denoise", steps=len(pauses)):
            for done, pause in enumerate(pauses, start=1):
                time.sleep(pause)
                phases.end_step(done)
    first, second = phases.stages
    assert len(first.seconds_per_step) == 1 and len(second.seconds_per_step) == 2
    assert phases.times.seconds_per_step == first.seconds_per_step + second.seconds_per_step
    assert first.seconds["text"] == 0.0 < phases.times.seconds["text"]
    assert phases.times.seconds["denoise"] == pytest.approx(first.seconds["denoise"] + second.seconds["denoise"])
    assert first.seconds["denoise"] >= 0.02 and second.seconds["denoise"] >= 0.04


def test_a_phase_that_fails_is_timed_too() -> None:
    phases = Phases()
    with pytest.raises(ZeroDivisionError), phases.phase("decode"):
        raise ZeroDivisionError
    assert phases.times.seconds["decode"] > 0.0


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


def test_gigabytes_and_their_rate_are_shown_while_loading() -> None:
    progress = Progress("{task.description}", "{task.fields[shown]}", TimeLeft(), console=Console(file=io.StringIO()))
    phases = Phases(progress)
    with phases.phase("load", detail=" the model"), phases.loading("transformer", 4_000_000_000) as advance:
        time.sleep(0.1)
        advance(1_000_000_000)
        task = progress.tasks[1]
        # One billion bytes in a tenth of a second, or a little more: the clock is read anew.
        done, rate = task.fields["shown"].split(", ")
        assert (task.description, done) == ("  transformer", "1.0/4.0 GB")
        assert 1.0 < float(rate.removesuffix(" GB/s")) <= 10.0
        assert str(TimeLeft().render(task)) == "left: 0:00:00"
    assert not progress.tasks[0].visible and not progress.tasks[1].visible
    (part,) = phases.parts
    assert (part.name, part.nbytes) == ("transformer", 4_000_000_000) and part.seconds >= 0.1


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
