"""Pictures stage by stage: each is drawn from noise, or from the former one, enlarged and refined (SDEdit, Sec. 4.3).

Ranks hold the pixel rows of their stripes only, in bytes; latents are equal on all that take part in a stage.

Shapes: B pictures, C channels, R my rows, E the rows that mine are interpolated from, W columns.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch
from torch import Tensor

from clear_dist.comm.group import Group
from clear_dist.comm.rows import move_rows
from clear_dist.drawing.beyond import extrapolation_of, ranks_of
from clear_dist.drawing.control import Control, conditions_of, controlled, striped_nets
from clear_dist.drawing.drawn import Drawing
from clear_dist.drawing.encoding import encode_rows, join_rows, to_bytes
from clear_dist.drawing.kept import Below, Kept
from clear_dist.drawing.masking import Stencil
from clear_dist.drawing.resize import resize_rows, rows_behind
from clear_dist.drawing.resume import Running, Unsaved
from clear_dist.engine.adapters import resting
from clear_dist.engine.agreement import fingerprint, require_equal_settings
from clear_dist.engine.family import Condition, OnStep, Others, ReferringAdapter
from clear_dist.engine.striped import require_striped
from clear_dist.geometry import Rows, cut_in_stripes
from clear_dist.observe.peaks import give_back
from clear_dist.observe.progress import Phases
from clear_dist.stages import Stage, Upscaling
from clear_dist.vae import decode_stripes

SEED_STRIDE = 0x9E3779B97F4A7C15
"""Distance between the seeds of stages, so that none meets a nearby request's."""

ENCODING, DECODING = 1.5, 3.0
"""Passes through the transformer that take equally long, on a CPU with the embedded model."""


class Cascade:
    """Stages of one request; every rank of the group calls the same methods in the same order."""

    def __init__(
        self,
        pipe: Any,
        embeddings: dict[str, Tensor],
        *,
        seed: int,
        others: Others = (0, 0),
        phases: Phases | None = None,
        on_step: OnStep | None = None,
        controls: Sequence[Control] = (),
        mask: Drawing | None = None,
        references: Sequence[Any] = (),
        checkpoints: Unsaved | None = None,
    ) -> None:
        """`pipe` is parallelized, `embeddings` are from `encode_prompts`, `controls` for its ControlNets, if any.

        `others` as `PipelineAdapter.denoise` takes them.
        With a mask (grey, in three channels), the picture that `run` begins with stays as it is where that is black.
        `references` are PIL's pictures, equal on all ranks, for a pipeline that looks at such. With `checkpoints` it
        goes on from the newest one.
        Raises ValueError where VAEs differ, or a ControlNet is not on stripes.
        """
        self._pipe = pipe
        self._striped = require_striped(pipe)
        self._models = (self._striped, *striped_nets(pipe))
        self._controls = controls
        require_equal_settings(self._striped.group, vae=fingerprint(pipe.vae))
        self._adapter = self._striped.family.adapted(pipe)
        if references:
            assert isinstance(self._adapter, ReferringAdapter), "refused before"
            self._adapter = self._adapter.referring(references)
        self._embeddings = embeddings
        self._seed = seed
        self._others = others
        self._is_guided = any(
            name in embeddings for name in self._adapter.arguments[len(self._adapter.arguments) // 2 :]
        )
        self._is_alone = not controls and not references
        self._phases = phases or Phases()
        self._on_step = on_step
        self._mask = mask
        self._checkpoints = checkpoints or Unsaved()
        self._stages_drawn = self._checkpoints.stage

    def run(
        self,
        stages: tuple[Stage, ...],
        before: Drawing | None = None,
        *,
        detail: str = "",
        around: Callable[[int], AbstractContextManager[None]] = lambda number: nullcontext(),
    ) -> Iterator[Drawing]:
        """Pictures stage by stage, the first from `before` or noise, each drawn inside `around(number)`.

        Stages that were finished before are left out.
        Raises a Refusal, before any is drawn, where the stale schedule's buffers of the last stage would not fit.
        """
        last, token = stages[-1], self._adapter.token_size
        batch = len(self._embeddings[self._adapter.arguments[0]])
        grid, sampling = (last.height // token, last.width // token), last.sampling
        for model in self._models:
            passes = sampling.passes if model is self._striped else 1
            model.require_room(grid, batch=batch, passes=passes, steps=sampling.steps)
        own, first = None if self._mask is None else before, self._checkpoints.stage
        before = self._checkpoints.before(before)
        for finished in stages[:first]:
            self._phases.skip(sum(work_of(finished).values()))
        for number, stage in enumerate(stages[first:], first):
            self._phases.begin_stage()
            with around(number):
                above = stages[number + 1].sampling if number + 1 < len(stages) else None
                keep = above.steps if isinstance(above, Upscaling) and above.way.keeps else 0
                nth = f"{detail}{nth_stage(number, len(stages))}"
                before = self.draw(stage, before, own, keep=keep, detail=nth)
            yield before
            if number + 1 < len(stages):
                self._checkpoints.end_stage(number, before)

    def draw(
        self,
        stage: Stage,
        before: Drawing | None = None,
        own: Drawing | None = None,
        *,
        keep: int = 0,
        detail: str = "",
    ) -> Drawing:
        """Pictures of one stage, from `before` or noise; ranks beyond the stage's, or its tokens', are idle.

        Where the mask is black, `own` stays. `keep`: how many of the last steps are kept for the next stage.
        """
        group, ranks = self._striped.group, ranks_of(stage, self._striped, self._adapter.token_size)
        stripes = cut_in_stripes(stage.height // self._adapter.token_size, ranks)
        held = self._in_pixels(stripes)
        part = group if ranks == group.size else group.split(ranks)
        start = mask = stencil = latents = pixels = None
        if before is not None:
            with self._phase("encode", stage, detail):
                stencil = self._stencil(own, stage, held)
                start, mask = self._encode(self._enlarge(before, stage, held), stencil, part, stripes)
        below = Below.of(None if before is None else before.kept, group, part, ranks, self._striped.counters)
        kept = Kept.of(stage, keep, below, group.rank, ranks)
        if group.rank < ranks:
            conditions = self._conditions(stage, part, stripes, detail)
            with self._phase("denoise", stage, detail):
                latents = self._denoise(stage, part, start, mask, conditions, below, kept)
            del start, conditions  # as large as the latents
            with self._phase("decode", stage, detail):
                pixels = self._decode(latents, stage, part, stripes)
                pixels = pixels if stencil is None else stencil.pasted(pixels)
        else:
            for counters in (model.counters for model in self._models):
                for _ in range(stage.sampling.steps):  # the report has an entry per step for every rank
                    counters.begin_step()
                counters.pause()
        if part is not group:
            part.close()
        self._stages_drawn += 1
        halves = 2 if self._splits(stage, ranks) else 1
        return Drawing(size=stage.size, rows=held, pixels=pixels, latents=latents, guidance_ranks=halves, kept=kept)

    def _splits(self, stage: Stage, ranks: int) -> bool:
        """Whether each half of the ranks takes a pass of a stage's guidance."""
        has_halves = self._striped.guidance.has_halves and ranks == self._striped.group.size
        return has_halves and self._is_guided and stage.sampling.passes > 1

    def _phase(self, name: str, stage: Stage, detail: str) -> AbstractContextManager[None]:
        give_back(self._striped.group.device)
        steps = stage.sampling.steps if name == "denoise" else None
        return self._phases.phase(name, detail=detail, steps=steps, work=work_of(stage)[name])

    def _conditions(self, stage: Stage, part: Group, stripes: tuple[Rows, ...], detail: str) -> tuple[Condition, ...]:
        if not self._controls:
            return ()
        adapter, counters = controlled(self._adapter), self._striped.counters
        with self._phase("encode", stage, f"{detail}, for the ControlNet"):
            return conditions_of(self._controls, adapter, self._pipe.vae, stage, part, stripes, counters)

    def _denoise(
        self,
        stage: Stage,
        part: Group,
        start: Tensor | None,
        mask: Tensor | None,
        conditions: tuple[Condition, ...],
        below: Below | None,
        kept: Kept | None,
    ) -> Tensor:
        adapter = controlled(self._adapter).controlled(conditions) if conditions else self._adapter
        pipe = self._pipe if start is None else self._adapter.refining(stage, below)
        pipe = pipe if kept is None else self._adapter.keeping(pipe, stage, kept)
        is_guided = self._is_guided and stage.sampling.passes > 1
        beyond = extrapolation_of(stage, self._striped, self._adapter, is_alone=self._is_alone)
        number = self._stages_drawn
        taken = self._checkpoints.steps_done(number)
        how: dict[str, Any] = {"scheduler": pipe.scheduler, "extrapolation": beyond, "done": taken}
        seed = (self._seed + number * SEED_STRIDE) % 2**63
        given: dict[str, Any] = {"seed": seed, "others": self._others, "start": start, "mask": mask}
        shared: dict[str, Any] = {"stage": stage, "number": number, "scheduler": pipe.scheduler, "group": part}
        state = Running(kept=kept, cache=self._striped.cache, counters=self._striped.counters, **shared)

        def end_step(pipe: Any, stage: Stage, done: int, latents: Tensor) -> Tensor:
            latents = self._checkpoints.end_step(state, done, latents)
            if self._on_step is not None and done >= taken:
                self._on_step(pipe, stage, done, latents)
            return latents

        with ExitStack() as running:
            running.enter_context(resting(self._striped.family.transformer, stage.resting))
            for model in self._models:  # a ControlNet, too, is above the size that it was trained at
                running.enter_context(model.running(group=part, is_guided=is_guided, **how))
            running.enter_context(self._checkpoints.heeding())
            return adapter.denoise(pipe, self._embeddings, stage, on_step=end_step, **given)

    def _enlarge(self, before: Drawing, stage: Stage, held: tuple[Rows, ...]) -> Tensor | None:
        """My rows at this stage's size, bytes [B, C, R, W]."""
        group, (height, width) = self._striped.group, before.size
        behind = tuple(rows_behind(rows, height, stage.height) for rows in held)
        mine = None if before.pixels is None else len(before.pixels)
        batch = group.broadcast_object(mine)  # rank 0 has always taken part
        pixels_BCEW = move_rows(
            before.pixels,
            group,
            before.rows,
            behind,
            shape=(batch, 3, width),
            dtype=torch.uint8,
            counters=self._striped.counters,
        )
        if not len(held[group.rank]):
            return None
        return resize_rows(
            pixels_BCEW, behind[group.rank].start, size=before.size, new_size=stage.size, rows=held[group.rank]
        )

    def _stencil(self, own: Drawing | None, stage: Stage, held: tuple[Rows, ...]) -> Stencil | None:
        """My rows of what stays at this stage's size; None: nothing does, or this rank idles."""
        if own is None or self._mask is None:
            return None
        own_1CRW, mask_1CRW = (self._enlarge(each, stage, held) for each in (own, self._mask))
        if own_1CRW is None or mask_1CRW is None:
            return None
        return Stencil(own=own_1CRW, mask=mask_1CRW[:, :1])

    def _encode(
        self, pixels_BCRW: Tensor | None, stencil: Stencil | None, group: Group, stripes: tuple[Rows, ...]
    ) -> tuple[Tensor | None, Tensor | None]:
        """Latents [B, C, H, W] of whole pictures: the means, so that ranks need not share any noise; and the mask's."""
        counters = self._striped.counters
        if pixels_BCRW is None:  # this rank idles
            return None, None
        pixels_BCRW = pixels_BCRW if stencil is None else stencil.pasted(pixels_BCRW)
        mean_BCRW = encode_rows(self._pipe.vae, pixels_BCRW, group, stripes, counters).chunk(2, dim=1)[0]
        start = self._adapter.from_vae(join_rows(mean_BCRW, group, stripes, counters))
        if stencil is None:
            return start, None
        mask = stencil.at_latents(pixels_BCRW.shape[3] // mean_BCRW.shape[3])
        return start, join_rows(mask.to(start.dtype), group, stripes, counters)

    @torch.no_grad()
    def _decode(self, latents: Tensor, stage: Stage, group: Group, stripes: tuple[Rows, ...]) -> Tensor:
        """My stripe in bytes [B, 3, R, W], which is what CLEAR's notebook refines too: decoders go beyond [-1, 1]."""
        vae, mine = self._pipe.vae, stripes[group.rank]
        rows_BCRW = self._adapter.for_vae(self._adapter.unpacked(latents, mine.relative_to(0), stage.size))
        return to_bytes(decode_stripes(vae, rows_BCRW.to(vae.dtype), group, stripes, counters=self._striped.counters))

    def _in_pixels(self, stripes: tuple[Rows, ...]) -> tuple[Rows, ...]:
        token, idle = self._adapter.token_size, self._striped.group.size - len(stripes)
        return (*(Rows(token * rows.start, token * rows.stop) for rows in stripes), *(Rows(0, 0),) * idle)


def nth_stage(number: int, count: int) -> str:
    """Words for a phase of stage `number`, from 0; none where there is one stage."""
    return f", stage {number + 1} of {count}" if count > 1 else ""


def work_of(stage: Stage) -> dict[str, float]:
    """Cost of a stage's phases, in tokens that go through the transformer; for the time left only."""
    tokens = stage.height * stage.width
    return {
        "encode": ENCODING * tokens * stage.starts_from_picture,
        "denoise": tokens * stage.sampling.steps * stage.sampling.passes,
        "decode": DECODING * tokens,
    }


def unit_size(pipe: Any) -> int:
    """Pixels that sides of pictures are multiples of; raises ValueError where the pipeline is not parallelized."""
    striped = require_striped(pipe)
    return striped.family.adapted(pipe).token_size * striped.settings.unit
