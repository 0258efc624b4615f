"""Work of each rank in `generate` and `upscale`: load, encode, draw stage by stage, save, report."""

import json
import shlex
import time
from concurrent.futures import wait
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from clear_dist.comm.group import close
from clear_dist.comm.mesh import SharedCount
from clear_dist.comm.rows import collect_stripes
from clear_dist.commands.prepare import Prepared, encode, refusing
from clear_dist.commands.saving import Saving
from clear_dist.drawing.cascade import Cascade, nth_stage, work_of
from clear_dist.drawing.control import Control
from clear_dist.drawing.drawn import Drawing
from clear_dist.drawing.given import WHITE, Given, from_image
from clear_dist.drawing.many import alike, draw_each
from clear_dist.drawing.prompts import share
from clear_dist.drawing.resume import require_repeatable
from clear_dist.engine.family import Encoded
from clear_dist.families.transformers import adapter_of
from clear_dist.geometry import Rows
from clear_dist.launch import env
from clear_dist.launch.aside import in_background
from clear_dist.launch.ends import PartlyFailed, say
from clear_dist.launch.interrupts import unwinding
from clear_dist.observe import peaks, report
from clear_dist.observe.progress import watched
from clear_dist.pictures import replacing
from clear_dist.pictures.alpha import Alpha
from clear_dist.plan.choice import by_size
from clear_dist.request.outputs import claimed
from clear_dist.request.pictures import decoded_file, load, load_mask
from clear_dist.request.request import Request
from clear_dist.stages import Stage, on_ranks

SECONDS_BETWEEN_LOOKS = 0.5
SAVING = 0.5
"""Share of a denoising step on a CPU; for the time left only."""


class Rendering(Prepared):
    def run(self) -> None:
        self.stages: list[report.StageFigures] = []
        request = self.request
        if request.resume:
            with refusing():
                require_repeatable(self.pipe.scheduler)
        self._expect()
        latents: list[Tensor] = []

        def draw(index: int) -> None:
            drawing = self._render_prompt(index, self.mine[index])
            if request.latents_out is not None and self.group.rank == 0:
                assert drawing.latents is not None, "rank 0 draws every stage"
                latents.append(drawing.latents.cpu())

        is_there = (lambda index: self._is_there(index, self.mine[index])) if request.resume else None
        kind, count = "picture" if request.enlarges else "prompt", len(request.prompts)
        listed: dict[str, Any] = {"mine": tuple(self.mine), "is_there": is_there, "kind": kind}
        outcome = draw_each(count, draw, group=self.group, keep_going=request.keep_going, **listed)
        self._wait_for_all()
        failed = {index: why for each in self.everyone.gather_objects(outcome.failed) for index, why in each.items()}
        if request.latents_out is not None:
            self._save_latents(request.latents_out, latents)
        if request.report is not None:
            self._report(request.report)
        for index in sorted(failed) if self.everyone.rank == 0 else ():
            say(f"{kind} {index + 1}, {request.outputs[index * request.num_images]}: {failed[index]}")
        if failed:
            raise PartlyFailed(f"{len(failed)} of {count} {kind}s failed, as told above; the others are there")

    def _expect(self) -> None:
        """Have progress shown of all groups' work."""
        work, request = 0.0, self.request
        for index in (index for group in range(request.data_ranks) for index in request.drawn_by(group)):
            stages = request.alone(index).stages
            saved = stages if request.save_stages else stages[-1:]
            work += sum(sum(work_of(stage).values()) for stage in stages) + sum(map(saving_work, saved))
        is_shared = self.group is not self.everyone and self.group.rank == 0
        self.phases.expect(work, SharedCount(self.everyone, "work done").add if is_shared else None)

    def _wait_for_all(self) -> None:
        """Wait for groups that draw other pictures, and show what they have done."""
        ended = in_background(self.everyone.barrier)
        while wait([ended], SECONDS_BETWEEN_LOOKS).not_done:
            self.phases.look()
        ended.result()

    def _save_latents(self, file: Path, drawn: list[Tensor]) -> None:
        """Write all groups' latents, in the order of pictures; `drawn` are mine, on a group's rank 0."""
        mine = torch.cat(drawn) if drawn else torch.empty(0)
        everyone = self.everyone.gather_objects((len(mine), mine.shape[1:], mine.dtype))
        counts = tuple(count for count, *_ in everyone)
        if not sum(counts):
            return
        shape, dtype = next((shape, dtype) for count, shape, dtype in everyone if count)
        held = mine if drawn else torch.empty((0, *shape), dtype=dtype)
        with self.phases.phase("save"):
            latents = list(collect_stripes(held, self.everyone, counts))
            if latents:
                with replacing(file) as partial:
                    partial.write_bytes(save({"latents": torch.cat(latents)}))

    def _saving(self, index: int, images: Rows, alpha: Alpha | None = None) -> Saving:
        request = self.request.alone(index)
        return Saving(
            request=request,
            prompt=self.request.prompts[index],
            settings=self._settings(request),
            seed=self._seed(request),
            group=self.group,
            files=self.request.outputs[index * request.num_images :][images.relative_to(0)],
            first=images.start,
            alpha=alpha,
            began=time.perf_counter(),
            within=self.resuming.folder(index, images),
        )

    def _is_there(self, index: int, images: Rows) -> bool:
        """Whether a prompt's pictures have been written; then their checkpoints go, which a kill may have left."""
        is_there = self._saving(index, images).is_there()
        if is_there:
            self.resuming.end(index, images)
        return is_there

    def _render_prompt(self, index: int, images: Rows) -> Drawing:
        request, count = self.request.alone(index), len(self.request.prompts)
        given, alpha = self._start(request)
        drawing = given.before
        saving = self._saving(index, images, alpha)
        kind = "picture" if request.enlarges else "prompt"
        detail = f", {kind} {index + 1} of {count}" if count > 1 else ""
        with self.phases.phase("text", detail=detail):
            embeddings = self._encode(index, images)
        others = images.start, request.num_images - images.stop
        shown: dict[str, Any] = {"phases": self.phases, "on_step": self._end_step}
        begun: dict[str, Any] = {
            "mask": given.mask,
            "references": given.references,
            "controls": self._controls(request),
        }
        seed = self._seed(request)
        begun["checkpoints"] = checkpoints = self.resuming.checkpoints(index, images, seed, self.group)
        cascade = Cascade(self.pipe, embeddings, seed=seed, others=others, **shown, **begun)
        stages, last = on_ranks(request.stages, by_size(self.fewer)), len(request.stages) - 1
        averages = self.handle.text_attention == "average"
        reasons = {each.size: each.words(averages=averages) for each in self.fewer}
        profile = self.profile if index == next(iter(self.mine)) else None

        def around(number: int) -> AbstractContextManager[None]:
            return profile.recording() if profile is not None and number == last else nullcontext()

        drawn_now = cascade.run(stages, drawing, detail=detail, around=around)
        for number, drawn in enumerate(drawn_now, checkpoints.stage):
            drawing, stage = drawn, stages[number]
            if number == last or request.save_stages:
                with self.phases.phase(
                    "save", detail=f"{detail}{nth_stage(number, len(stages))}", work=saving_work(stage)
                ):
                    saving.save(drawing, last=number == last)
            if profile is not None and number == last:
                with self.phases.phase("save", detail=", the profile"):
                    profile.write()
                    self.group.barrier()
                    if self.everyone.rank == 0:
                        first = shlex.quote(str(request.traces[0]))
                        print(f"profile={first} ranks={self.everyone.size} steps={profile.steps}", flush=True)
            if self.group.rank == 0:
                self.stages.append(self._figures(drawn, reasons.get(stage.size)))
        if self.group.rank == 0:
            self.resuming.end(index, images)
        assert drawing is not None, "there is at least one stage"
        return drawing

    def _figures(self, drawn: Drawing, why: str | None) -> report.StageFigures:
        """Report's figures of the stage just drawn; for a group's rank 0, which draws every stage."""
        return report.StageFigures(
            image=self.handle.last_image,
            ranks=len(list(filter(len, drawn.rows))),
            times=self.phases.stages[-1],
            why=why,
            guidance_ranks=drawn.guidance_ranks,
            data_rank=self.data_rank,
        )

    def _start(self, request: Request) -> tuple[Given, Alpha | None]:
        """The picture to begin with, with its mask, and its alpha on rank 0."""
        picture, group = request.picture, self.group
        if picture is None:
            return Given(), None
        image, alpha, mask = None, None, None
        with alike(group):
            if group.rank == 0:
                image, alpha = load(picture)
                mask = load_mask(picture)
        if request.looks:
            return Given(references=(group.broadcast_object(image),)), None
        masking = None if picture.mask is None else from_image(mask, group)
        alone = None if alpha is None else Alpha(alpha, picture.background)
        return Given(before=from_image(image, group), mask=masking), alone

    def _controls(self, request: Request) -> tuple[Control, ...]:
        """What the ControlNet is shown, on rank 0: the picture that is enlarged where no other was given."""
        control, image = request.control, None
        if control is None:
            return ()
        with alike(self.group):
            if self.group.rank == 0 and control.image is not None:
                image = decoded_file(control.image).laid_on(WHITE)
            elif self.group.rank == 0:
                assert request.picture is not None, "generate has been given a picture for it"
                image, _ = load(request.picture)
        return (Control(image=image, scale=control.scale, mode=control.mode),)

    def _encode(self, index: int, images: Rows) -> dict[str, Tensor]:
        encoded: Encoded = []
        if self.encoded is not None:
            encoded = self.encoded[index]
        elif self.group.rank == 0:
            (encoded,) = encode(self.pipe, self.request, [index])
        adapter, counters = adapter_of(self.pipe), self.handle.counters
        return share(adapter, self.group, counters, encoded, num_images=len(images))

    def _end_step(self, pipe: Any, stage: Stage, done: int, latents: Tensor) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # else only the launch of the step's kernels is timed
        self.phases.end_step(done)
        if self.profile is not None:
            self.profile.after_step()
        if self.previews is not None:
            self.previews.after_step(pipe, stage, done, latents)

    def _seed(self, request: Request) -> int:
        return self.seed if request.seed is None else request.seed

    def _settings(self, request: Request) -> dict[str, Any]:
        chosen: dict[str, Any] = {"seed": self._seed(request), "text_attention": self.handle.text_attention}
        chosen["transport"] = self.group.transport
        return json.loads(json.dumps(asdict(request), default=str)) | chosen

    def _report(self, file: Path) -> None:
        figures = report.RankFigures(
            peak_memory_bytes=peaks.peak_memory(self.device),
            peak_since_loading=self.peak_since_loading,
            weight_bytes=self.handle.weight_bytes,
            stale_buffer_bytes=self.handle.stale_buffer_bytes,
            compile_seconds=self.compile_time.seconds,
            comm=self.handle.counters.as_dict(),
            loading_peak_bytes=self.loading_peak_bytes,
            host_memory_bytes=self.host_memory_bytes,
        )
        gathered = self.everyone.gather_objects((figures, self.stages))
        if self.everyone.rank != 0:
            return
        contents = report.build(
            seed=self.seed,
            settings=self._settings(self.request),
            times=self.phases.times,
            launch=self.launch,
            total=time.time() - self.began,
            stages=[stage for _, stages in gathered for stage in stages],
            ranks=[figures for figures, _ in gathered],
            clear_weights=None if self.handle.replaced is None else self.handle.replaced.figures,
            parts=self.phases.parts,
        )
        report.write(contents, file)


def saving_work(stage: Stage) -> float:
    """Cost of saving, in the unit of `work_of`."""
    return SAVING * stage.height * stage.width


def render(request: Request, began: float) -> None:
    """Make a request's pictures; `began` is wall clock. Raises a Refusal for what only the loaded model could tell."""
    rank = env.read().rank
    given = (*request.outputs, request.latents_out, request.report, request.profile)
    with (
        claimed(given, rank=rank) as taken,
        watched(rank=rank, say=say, quiet=request.quiet) as phases,
        torch.inference_mode(),
    ):
        rendering = Rendering(request, began, phases, taken)
        with rendering.compile_time.measuring(), unwinding():  # from here on files are written
            rendering.run()
    rendering.handle.close()
    close(list(dict.fromkeys((rendering.everyone, rendering.group))), rendering.everyone)
