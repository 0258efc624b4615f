"""Ranks that wait for tasks, stop them together, and go on."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import clear_dist
from clear_dist.comm.group import Group
from clear_dist.comm.words import broadcast_bytes
from clear_dist.parallelize import parallelize
from clear_dist.serving import worker
from clear_dist.serving.draw import Held, Inputs
from clear_dist.serving.errors import CANCELLED, ApiError
from clear_dist.serving.loras import Shelf
from clear_dist.serving.task import Task
from clear_dist.stages import ImageToImage, Sampling, Stage, Upscaling
from tests.ranks import RanksFailedError, run_ranks
from tests.tiny import make_tiny_pipeline

SHORT = 5.0
"""Seconds of a group's timeout, as 600 are of a real one's."""
STAGES = (Stage(height=96, width=64, sampling=Sampling(steps=5)),)


@dataclass(kw_only=True)
class Asked:
    """A commission whose steps are counted."""

    task: Task
    inputs: Inputs
    stop_after: int | None = None
    steps: list[int] = field(default_factory=list)
    ended: list[ApiError | None] = field(default_factory=list)

    @property
    def watch(self) -> "Asked":
        return self

    def is_stopped(self) -> bool:
        return self.stop_after is not None and len(self.steps) >= self.stop_after

    def progress(self, stage: int, step: int, work: float) -> None:
        pass

    def step(self, pipe: Any, stage: Stage, done: int, latents: Tensor) -> None:
        self.steps.append(done)

    def end(self, error: ApiError | None) -> None:
        self.ended.append(error)


def asked(file: Path, **rest: Any) -> Asked:
    inputs = Inputs(
        prompts=("a hill",),
        negative_prompt=None,
        max_sequence_length=8,
        files=(file,),
        metadata=[{}],
        compression=None,
        picture=None,
    )
    return Asked(task=Task(stages=STAGES, seeds=(5,), images=(1,)), inputs=inputs, **rest)


def idle(group: Group, silence: float, beats: int) -> bool:
    """Wait for longer than the group's timeout, with words of rank 0 every `silence` seconds."""
    short = Group.create("cpu", timeout_seconds=SHORT)
    held, left = Held(pipe=None, group=short, counters=None, ranks={}, shelf=None), beats  # type: ignore[arg-type]

    def nothing(_: float) -> None:
        nonlocal left
        left -= 1
        time.sleep(silence)

    first = group.rank == 0
    worker.work(held, nothing if first else None, (lambda: left == 0) if first else bool)
    return True


def test_ranks_wait_for_longer_than_a_timeout() -> None:
    assert run_ranks(idle, 2, silence=worker.BEAT, beats=4) == [True, True]
    assert 4 * worker.BEAT > SHORT


def test_ranks_that_hear_nothing_end() -> None:
    with pytest.raises(RanksFailedError, match="PeerLost"):
        run_ranks(idle, 2, silence=2 * SHORT, beats=1)


def served(group: Group, folder: Path) -> list[Any]:
    """One that is stopped, one whose file cannot be written, one that is drawn; what rank 0 saw of each."""
    pipe = make_tiny_pipeline()
    pipe.set_progress_bar_config(disable=True)
    if group.rank > 0:
        pipe.register_modules(text_encoder=None, text_encoder_2=None, tokenizer=None, tokenizer_2=None)
    handle = parallelize(pipe, window="full", group=group)
    files = (folder / "stopped.png", folder / "missing" / "lost.png", folder / "drawn.png")
    tasks = [asked(file, stop_after=2 if file is files[0] else None) for file in files]
    waiting = list(tasks)

    def following(_: float) -> Asked | None:
        return waiting.pop(0) if waiting else None

    held = Held(
        pipe=pipe, group=group, counters=handle.counters, ranks={}, shelf=Shelf(pipe=pipe, group=group, folder=None)
    )
    first = group.rank == 0
    with torch.inference_mode():
        worker.work(
            held, following if first else None, (lambda: not waiting and len(tasks[-1].ended) > 0) if first else bool
        )
    return [(each.steps, [None if error is None else error.status for error in each.ended]) for each in tasks]


@pytest.mark.parametrize("ranks", [1, 3])
def test_tasks_harm_no_other(tmp_path: Path, ranks: int) -> None:
    stopped, lost, drawn = run_ranks(served, ranks, tmp_path)[0]
    assert stopped == ([1, 2], [CANCELLED.status])
    assert lost == ([1, 2, 3, 4, 5], [500])
    assert drawn == ([1, 2, 3, 4, 5], [None])
    assert [file.name for file in tmp_path.iterdir()] == ["drawn.png"]
    pipe = make_tiny_pipeline()
    pipe.set_progress_bar_config(disable=True)
    parallelized = parallelize(pipe, window="full")
    given: dict[str, Any] = {"height": 96, "width": 64, "num_inference_steps": 5, "max_sequence_length": 8, "seed": 5}
    alone = clear_dist.generate(pipe, "a hill", **given)[0]
    parallelized.undo()
    with Image.open(tmp_path / "drawn.png") as picture:
        assert np.abs(np.asarray(picture).astype(int) - np.asarray(alone)).max() <= 1


def told(group: Group, words: list[bytes]) -> list[bytes]:
    return [broadcast_bytes(group, word if group.rank == 1 else b"other", source=1) for word in words]


def test_bytes_travel_whole() -> None:
    words = [b"", b"\0", bytes(range(256)) * 1000]
    assert run_ranks(told, 3, words) == [words] * 3


SAMPLINGS: tuple[Callable[[], Sampling], ...] = (
    lambda: Sampling(steps=3, guidance_scale=1.5, true_cfg_scale=2.0),
    lambda: ImageToImage.of(Sampling(steps=7), 0.4),
    lambda: Upscaling(steps=4, strength=0.3, refinement="hiflow", later_steps=2),
)


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_a_task_is_the_same_after_its_journey(sampling: Callable[[], Sampling]) -> None:
    stages = (Stage(height=64, width=80, sampling=sampling(), ranks=2, resting=("lora_0",)),)
    task = Task(
        stages=stages, seeds=(2**63 - 1,), images=(3,), loras=(("a.safetensors", -0.5),), start="picture", has_mask=True
    )
    assert Task.of_json(task.to_json()) == task


@pytest.mark.parametrize(
    "text", ["", "{}", '{"stages": [{"kind": "eval", "sampling": {}}], "seeds": [], "images": []}']
)
def test_what_is_no_task_is_none(text: str) -> None:
    with pytest.raises((ValueError, KeyError, TypeError)):
        Task.of_json(text)
