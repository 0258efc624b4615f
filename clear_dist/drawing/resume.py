"""A picture that survives its ranks: its stages and steps are kept on disk, and drawn on from by any number of ranks.

A stage that is gone on with runs diffusers' loop from its beginning, so that noise, levels and counters are those of an
undisturbed one. Forwards of steps that have been taken before are left out (`Guidance.answers`), but for the first,
which tells what an answer looks like; then the callback puts the latents in their place. Euler's steps remember nothing
else. What else is remembered (`Running`) is put back, too. The stale schedule's halos are not: the first step is
synchronous.

All ranks of a picture call the same methods; rank 0 alone reads and writes, and all go on where it says.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import accumulate, pairwise
from math import prod
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from safetensors import SafetensorError
from torch import Tensor

from clear_dist.comm.counters import Counters
from clear_dist.comm.group import Group
from clear_dist.comm.rows import collect_stripes, move_rows
from clear_dist.drawing.checkpoints import CheckpointFolder, Newest, Saved
from clear_dist.drawing.drawn import Drawing
from clear_dist.drawing.kept import Kept
from clear_dist.engine.step_cache import StepCache
from clear_dist.geometry import Rows
from clear_dist.launch.ends import describe, say
from clear_dist.launch.interrupts import noted
from clear_dist.stages import Stage

LATENTS, PICTURE, KEPT, LED, CACHES = "latents", "picture", "kept", "led", "caches"


@dataclass(frozen=True, kw_only=True)
class Running:
    """What the steps to come of a stage depend on, beside its latents, on the ranks that draw it."""

    stage: Stage
    number: int
    """From 0."""
    scheduler: Any
    cache: StepCache
    kept: Kept | None
    group: Group
    counters: Counters

    def collected(self) -> Saved:
        """All of it, tensors on rank 0 alone, of whole pictures but for caches; all ranks call this."""
        leading = getattr(self.scheduler, "leading", None)
        tensors = {} if leading is None else {f"{LED}.{place}": x for place, x in enumerate(leading.before or ())}
        notes: dict[str, Any] = {LED: len(tensors)}
        held, about = self.cache.collected()
        notes[CACHES] = self.group.gather_objects((about, [(list(x.shape), str(x.dtype)) for x in held]))
        pieces = collect_stripes(as_bytes(held), self.group, tuple(bytes_of(shapes) for _, shapes in notes[CACHES]))
        if caches := list(pieces):
            tensors[CACHES] = torch.cat(caches)
        if self.kept is not None:
            whole, notes[KEPT] = self.kept.collected(self.group)
            tensors |= {} if whole is None else {KEPT: whole}
        return Saved(tensors=tensors, notes=notes)

    def put_back(self, tensors: Mapping[str, Tensor], notes: Mapping[str, Any]) -> None:
        """The inverse, on any number of ranks."""
        led = self.group.broadcast_tensors(
            [tensors[f"{LED}.{place}"] for place in range(notes[LED])] if tensors else []
        )
        if led:
            self.scheduler.leading.before = tuple(led)
        self._put_caches_back(tensors.get(CACHES), notes[CACHES])
        if self.kept is not None:
            self.kept.put_back(tensors.get(KEPT), notes[KEPT], self.group, self.counters)

    def _put_caches_back(self, whole: Tensor | None, notes: Sequence[Any]) -> None:
        if len(notes) != self.group.size:
            assert not any(kinds for _, kinds in notes), "another number of ranks is refused with a cache"
            return
        about, kinds = notes[self.group.rank]
        ends = list(accumulate((bytes_of(shapes) for _, shapes in notes), initial=0))
        everything = Rows(0, ends[-1])
        mine = move_rows(
            None if whole is None else whole.to(self.group.device)[None, None, :, None],
            self.group,
            (everything, *(Rows(0, 0),) * (self.group.size - 1)),
            tuple(Rows(start, stop) for start, stop in pairwise(ends)),
            shape=(1, 1, 1),
            dtype=torch.uint8,
            counters=self.counters,
        )
        self.cache.put_back(from_bytes(mine.flatten(), kinds), about)


def as_bytes(tensors: Sequence[Tensor]) -> Tensor:
    """All bytes of tensors, in host memory."""
    return torch.cat([torch.empty(0, dtype=torch.uint8), *(x.cpu().flatten().view(torch.uint8) for x in tensors)])


def from_bytes(data: Tensor, kinds: Sequence[tuple[Sequence[int], str]]) -> list[Tensor]:
    """The inverse of `as_bytes` for tensors of these shapes and dtypes, on the data's device."""
    parts = data.split([bytes_of([kind]) for kind in kinds])
    dtypes = [getattr(torch, name.removeprefix("torch.")) for _, name in kinds]
    found = zip(parts, dtypes, kinds, strict=True)
    return [part.clone().view(dtype).view(*shape) for part, dtype, (shape, _) in found]


def bytes_of(kinds: Sequence[tuple[Sequence[int], str]]) -> int:
    return sum(prod(shape) * getattr(torch, name.removeprefix("torch.")).itemsize for shape, name in kinds)


def require_repeatable(scheduler: Any) -> None:
    """Raises ValueError for a scheduler that remembers steps, or draws noise in them."""
    draws = scheduler.config.get("stochastic_sampling", False)
    if not isinstance(scheduler, FlowMatchEulerDiscreteScheduler) or draws:
        shown = f"{type(scheduler).__name__}{' with stochastic_sampling' * draws}"
        nearest = FlowMatchEulerDiscreteScheduler.__name__
        raise ValueError(f"resume needs a scheduler that remembers nothing, got {shown}; nearest: {nearest}")


class Unsaved:
    """No checkpoints: a picture that is lost begins anew."""

    stage = step = 0
    """Stages that are finished, and steps that have been taken of the next one."""

    def before(self, given: Drawing | None) -> Drawing | None:
        """What stage `stage` starts from; the first one from what is `given`."""
        return given

    def steps_done(self, number: int) -> int:
        """Steps of stage `number`, from 0, that were taken before."""
        return self.step if number == self.stage else 0

    def end_step(self, running: Running, done: int, latents: Tensor) -> Tensor:
        """Latents to go on with after `done` steps."""
        return latents

    def end_stage(self, number: int, drawing: Drawing) -> None:
        """End stage `number`, which is not the last, with what it has drawn."""

    def heeding(self) -> AbstractContextManager[None]:
        """Context of a stage's steps."""
        return nullcontext()


class Checkpoints(Unsaved):
    """Checkpoints of a picture: every so many steps of a stage, after its last one, and where an interrupt comes."""

    def __init__(self, folder: CheckpointFolder, group: Group, every: int) -> None:
        """Find the newest one; all ranks of `group` call this."""
        self._folder, self._group, self._every = folder, group, every
        self._asked: Callable[[], bool] = bool
        self._newest = folder.newest() if group.rank == 0 else Newest()
        mine = self._newest
        self.stage, self.step, *notes = group.broadcast_object(
            (mine.stage, mine.step, mine.begun.notes, mine.running.notes)
        )
        self._begun, self._running = notes

    def before(self, given: Drawing | None) -> Drawing | None:
        if not self.stage:
            return given
        group, kept, height = self._group, None, self._begun["size"][0]
        tensors = self._newest.begun.tensors
        if (about := self._begun[KEPT]) is not None:
            named = {name: about[name] for name in ("steps", "count", "level")}
            kept = Kept(rank=group.rank, ranks=1, **named)
            kept.put_back(tensors.get(KEPT), about, group, Counters())
        return Drawing(
            size=(height, self._begun["size"][1]),
            rows=(Rows(0, height), *(Rows(0, 0),) * (group.size - 1)),
            pixels=tensors[PICTURE].permute(1, 2, 0, 3).to(group.device) if tensors else None,
            kept=kept,
        )

    def end_step(self, running: Running, done: int, latents: Tensor) -> Tensor:
        before = self.steps_done(running.number)
        if before and done <= before:
            return self._put_back(running, latents) if done == before else latents
        asked = running.group.agree(self._asked())
        if asked or done % self._every == 0 or done == running.stage.sampling.steps:
            saved = running.collected()
            self._write(running.number, done, {**saved.tensors, LATENTS: latents}, saved.notes)
        if asked:
            if self._group.rank == 0:
                say(f"stopped after step {done}; the same command goes on from {self._folder.path}")
            raise KeyboardInterrupt
        return latents

    def end_stage(self, number: int, drawing: Drawing) -> None:
        mine = torch.empty(0) if drawing.pixels is None else drawing.pixels.permute(2, 0, 1, 3)
        rows = list(collect_stripes(mine, self._group, tuple(map(len, drawing.rows))))
        kept, about = (None, None) if drawing.kept is None else drawing.kept.collected(self._group)
        tensors = {} if kept is None else {KEPT: kept}
        if rows:
            tensors[PICTURE] = torch.cat(rows)
        self._write(number + 1, 0, tensors, {"size": drawing.size, KEPT: about})

    @contextmanager
    def heeding(self) -> Iterator[None]:
        with noted() as self._asked:
            yield

    def _put_back(self, running: Running, latents: Tensor) -> Tensor:
        tensors = self._newest.running.tensors
        found = running.group.broadcast_tensors([tensors[LATENTS]] if tensors else [])[0]
        running.put_back(tensors, self._running)
        self._newest = Newest()  # as large as the latents
        assert found is not None and found.shape == latents.shape, "of the same request"
        return found

    def _write(self, stage: int, step: int, tensors: Mapping[str, Tensor], notes: Mapping[str, Any]) -> None:
        if self._group.rank != 0:
            return
        try:
            self._folder.write(stage, step, Saved(tensors=tensors, notes=notes))
        except (OSError, SafetensorError) as error:  # no reason to lose the picture itself
            say(f"warning: no checkpoint: {describe(error)}")
