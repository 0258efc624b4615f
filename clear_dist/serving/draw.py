"""Pictures of a task, drawn by all ranks with the model that they hold; rank 0 reads, tells and writes."""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from clear_dist.comm.counters import Counters
from clear_dist.comm.group import Group
from clear_dist.drawing.cascade import Cascade, work_of
from clear_dist.drawing.drawn import Drawing
from clear_dist.drawing.generation import picture_rows
from clear_dist.drawing.many import alike
from clear_dist.drawing.prompts import encode_prompts
from clear_dist.engine.striped import require_striped
from clear_dist.families.transformers import adapter_of
from clear_dist.observe.progress import Phases
from clear_dist.pictures import save_picture
from clear_dist.serving.task import Task
from clear_dist.stages import Size, Stage, on_ranks


class Stopped(Exception):
    """Rank 0 has decided that nobody wants the rest; raised on all ranks alike."""


class Watch(Protocol):
    """What rank 0 knows of a task, and is told meanwhile; the others have `Unwatched`."""

    def is_stopped(self) -> bool: ...

    def progress(self, stage: int, step: int, work: float) -> None:
        """`work`: share of all that is done."""

    def step(self, pipe: Any, stage: Stage, done: int, latents: Tensor) -> None:
        """Called after each step, while the others wait."""


class Unwatched:
    def is_stopped(self) -> bool:
        return False

    def progress(self, stage: int, step: int, work: float) -> None:
        pass

    def step(self, pipe: Any, stage: Stage, done: int, latents: Tensor) -> None:
        pass


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What only rank 0 has of a task, in the order of its requests."""

    prompts: tuple[str, ...]
    negative_prompt: str | None
    max_sequence_length: int
    files: Sequence[Path]
    """Of all pictures."""
    metadata: Sequence[dict[str, str]]
    compression: int | None


@dataclass(frozen=True, kw_only=True)
class Held:
    """The model as each rank holds it."""

    pipe: Any
    group: Group
    counters: Counters
    ranks: Mapping[Size, int]
    """Ranks that draw a stage, by its size, where not all do."""


def draw(held: Held, task: Task, inputs: Inputs | None, watch: Watch) -> None:
    """Draw and write all pictures of a task; all ranks call this, rank 0 with inputs.

    Raises on all ranks alike: Stopped, ItemFailed where a file cannot be written, ValueError as the engine.
    """
    group, stages = held.group, on_ranks(task.stages, held.ranks)
    embeddings = _embeddings(held, task, inputs)
    total, taken = sum(map(work_in, stages)), 0.0
    phases, place = Phases(), [0, 0]

    def add(work: float) -> float:
        nonlocal taken
        taken += work
        watch.progress(place[0], place[1], min(1.0, taken / total))
        return taken

    def end_step(pipe: Any, stage: Stage, done: int, latents: Tensor) -> None:
        if group.device.type == "cuda":
            torch.cuda.synchronize(group.device)
        if require_striped(pipe).group.agree(watch.is_stopped()):
            raise Stopped
        place[1] = done
        phases.end_step(done)
        watch.step(pipe, stage, done, latents)

    phases.expect(total, add)
    cascade = Cascade(held.pipe, embeddings, seed=task.seeds[0], phases=phases, on_step=end_step)
    drawing = None
    for number, drawn in enumerate(_stages(cascade.run(stages), group)):
        drawing, place[:] = drawn, [min(number + 1, len(stages) - 1), 0]
    assert drawing is not None, "there is at least one stage"
    for index in range(sum(task.images)):
        _save(drawing, index, group, inputs)
    add(total)


def work_in(stage: Stage) -> float:
    """Cost of a stage, in the unit of `work_of`."""
    return sum(work_of(stage).values())


def _stages(drawings: Iterator[Drawing], group: Group) -> Iterator[Drawing]:
    """Drawings of stages; ranks that idle in one learn at its end whether the others have stopped."""
    while True:
        try:
            drawn = next(drawings, None)
        except Stopped:
            group.agree(True)
            raise
        if drawn is None:
            return
        if group.agree(False):
            raise Stopped
        yield drawn


def _embeddings(held: Held, task: Task, inputs: Inputs | None) -> dict[str, Tensor]:
    prompts: tuple[str, ...] = ("",)
    negative, most = None, 1  # of ranks that have no text encoders
    if inputs is not None:
        prompts, most = inputs.prompts, inputs.max_sequence_length
        negative = inputs.negative_prompt if max(stage.sampling.passes for stage in task.stages) > 1 else None
    return encode_prompts(
        adapter_of(held.pipe),
        held.group,
        held.counters,
        list(prompts),
        negative_prompts=None if negative is None else [negative] * len(prompts),
        max_sequence_length=most,
        num_images=task.images[0],
    )


def _save(drawing: Drawing, index: int, group: Group, inputs: Inputs | None) -> None:
    rows = picture_rows(drawing, index, group)
    with alike(group):
        try:
            if inputs is not None:
                height, width = drawing.size
                save_picture(rows, inputs.files[index], height=height, width=width, metadata=inputs.metadata[index])
        except OSError:
            deque(rows, maxlen=0)  # the others still send
            raise
        deque(rows, maxlen=0)  # sends
