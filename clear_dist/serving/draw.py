"""Pictures of a task, drawn by all ranks with the model that they hold; rank 0 reads, tells and writes."""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL.Image import fromarray
from torch import Tensor

from clear_dist.comm.counters import Counters
from clear_dist.comm.group import Group
from clear_dist.drawing.cascade import Cascade, work_of
from clear_dist.drawing.drawn import Drawing
from clear_dist.drawing.generation import picture_rows
from clear_dist.drawing.given import Given, from_image
from clear_dist.drawing.many import alike
from clear_dist.drawing.prompts import encode_prompts
from clear_dist.engine.striped import require_striped
from clear_dist.families.transformers import adapter_of
from clear_dist.observe.progress import Phases
from clear_dist.pictures import keeps_alpha, save_picture
from clear_dist.pictures.alpha import Alpha
from clear_dist.request.pictures import load, load_mask
from clear_dist.request.request import Picture
from clear_dist.serving.loras import Shelf
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
    picture: Picture | None
    """To start from, or to look at."""
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
    shelf: Shelf


def draw(held: Held, task: Task, inputs: Inputs | None, watch: Watch) -> None:
    """Draw and write all pictures of a task; all ranks call this, rank 0 with inputs.

    Raises on all ranks alike: Stopped, ItemFailed where a file cannot be written, ValueError as the engine.
    """
    group, stages = held.group, on_ranks(task.stages, held.ranks)
    held.shelf.hold(task.loras)
    given, alpha = _given(group, task, inputs)
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
    begun: dict[str, Any] = {"mask": given.mask, "references": given.references}
    cascade = Cascade(held.pipe, embeddings, seed=task.seeds[0], phases=phases, on_step=end_step, **begun)
    drawing = None
    for number, drawn in enumerate(_stages(cascade.run(stages, given.before), group)):
        drawing, place[:] = drawn, [min(number + 1, len(stages) - 1), 0]
    assert drawing is not None, "there is at least one stage"
    for index in range(sum(task.images)):
        _save(drawing, index, group, inputs, alpha)
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


def _given(group: Group, task: Task, inputs: Inputs | None) -> tuple[Given, Alpha | None]:
    """The picture to begin with, with its mask, and its alpha on rank 0."""
    image, alpha, mask, picture = None, None, None, None if inputs is None else inputs.picture
    if task.start == "noise":
        return Given(), None
    with alike(group):
        if picture is not None:
            image, alpha = load(picture)
            mask = load_mask(picture)
    if task.start == "looks":
        pixels = None if image is None else torch.from_numpy(np.array(image))
        (shown,) = group.broadcast_tensors([pixels])
        assert shown is not None, "rank 0 has it"
        return Given(references=(fromarray(shown.cpu().numpy()),)), None
    masking = from_image(mask, group) if task.has_mask else None
    alone = None if alpha is None or picture is None else Alpha(alpha, picture.background)
    return Given(before=from_image(image, group), mask=masking), alone


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


def _save(drawing: Drawing, index: int, group: Group, inputs: Inputs | None, alpha: Alpha | None) -> None:
    rows = picture_rows(drawing, index, group)
    with alike(group):
        try:
            if inputs is not None:
                (height, width), file = drawing.size, inputs.files[index]
                own: dict[str, Any] = {"metadata": inputs.metadata[index], "quality": inputs.compression}
                kept = alpha if keeps_alpha(file) else None
                save_picture(rows, file, height=height, width=width, alpha=kept, **own)
        except OSError:
            deque(rows, maxlen=0)  # the others still send
            raise
        deque(rows, maxlen=0)  # sends


def counting(pipe: Any) -> Callable[[str], int]:
    """What counts a prompt's tokens: the last tokenizer is the language model's."""
    named = sorted(name for name, part in pipe.components.items() if name.startswith("tokenizer") and part is not None)
    tokenizer = pipe.components[named[-1]]
    plain = getattr(tokenizer, "tokenizer", tokenizer)  # a processor has one
    return lambda text: len(plain(text, truncation=False, verbose=False).input_ids)
