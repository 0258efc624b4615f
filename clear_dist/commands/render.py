"""Work of each rank in `generate` and `upscale`: load, encode, draw stage by stage, save, report."""

import json
import shlex
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from clear_dist.commands.prepare import Prepared, encode
from clear_dist.commands.saving import Saving
from clear_dist.drawing.cascade import Cascade, Drawing, nth_stage, work_of
from clear_dist.drawing.control import Control
from clear_dist.drawing.generation import WHITE, from_image
from clear_dist.drawing.many import alike, draw_each
from clear_dist.drawing.prompts import share
from clear_dist.engine.family import Encoded
from clear_dist.families.transformers import adapter_of
from clear_dist.launch import env
from clear_dist.launch.ends import Failure, say
from clear_dist.launch.interrupts import unwinding
from clear_dist.observe import peaks, report
from clear_dist.observe.progress import watched
from clear_dist.pictures import replacing
from clear_dist.pictures.alpha import Alpha
from clear_dist.plan.choice import by_size
from clear_dist.request.outputs import claimed
from clear_dist.request.pictures import decoded_file, load
from clear_dist.request.request import Request
from clear_dist.stages import Stage, on_ranks

SAVING = 0.5
"""Share of a denoising step on a CPU; for the time left only."""


class Rendering(Prepared):
    def run(self) -> None:
        self.stages: list[report.StageFigures] = []
        request = self.request
        work = 0.0
        for index in range(len(request.prompts)):
            stages = request.alone(index).stages
            saved = stages if request.save_stages else stages[-1:]
            work += sum(sum(work_of(stage).values()) for stage in stages) + sum(map(saving_work, saved))
        self.phases.expect(work)
        latents: list[Tensor] = []

        def draw(index: int) -> None:
            drawing = self._render_prompt(index)
            if request.latents_out is not None and self.group.rank == 0:
                assert drawing.latents is not None, "rank 0 draws every stage"
                latents.append(drawing.latents.cpu())

        is_there = (lambda index: self._saving(index).is_there()) if request.resume else None
        kind = "picture" if request.pictures else "prompt"
        outcome = draw_each(len(request.prompts), draw, group=self.group, is_there=is_there, kind=kind)
        if request.latents_out is not None and latents:
            with self.phases.phase("save"), replacing(request.latents_out) as partial:
                partial.write_bytes(save({"latents": torch.cat(latents)}))
        if request.report is not None:
            self._report(request.report)
        if outcome.failed:
            count = len(request.prompts)
            raise Failure(f"{len(outcome.failed)} of {count} {kind}s failed, as told above; the others are there")

    def _saving(self, index: int, alpha: Alpha | None = None) -> Saving:
        request = self.request.alone(index)
        return Saving(
            request=request,
            prompt=self.request.prompts[index],
            settings=self._settings(request),
            seed=self.seed,
            group=self.group,
            files=self.request.outputs[index * request.num_images :][: request.num_images],
            alpha=alpha,
            began=time.perf_counter(),
        )

    def _render_prompt(self, index: int) -> Drawing:
        request, count = self.request.alone(index), len(self.request.prompts)
        drawing, alpha = self._start(request)
        saving = self._saving(index, alpha)
        kind = "prompt" if request.picture is None else "picture"
        detail = f", {kind} {index + 1} of {count}" if count > 1 else ""
        with self.phases.phase("text", detail=detail):
            embeddings = self._encode(index)
        cascade = Cascade(
            self.pipe,
            embeddings,
            seed=self.seed,
            phases=self.phases,
            on_step=self._end_step,
            controls=self._controls(request),
        )
        stages, last = on_ranks(request.stages, by_size(self.fewer)), len(request.stages) - 1
        averages = self.handle.text_attention == "average"
        reasons = {each.size: each.words(averages=averages) for each in self.fewer}
        profile = self.profile if index == 0 else None

        def around(number: int) -> AbstractContextManager[None]:
            return profile.recording() if profile is not None and number == last else nullcontext()

        for number, drawn in enumerate(cascade.run(stages, drawing, detail=detail, around=around)):
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
                    if self.group.rank == 0:
                        first = shlex.quote(str(request.traces[0]))
                        print(f"profile={first} ranks={self.group.size} steps={profile.steps}", flush=True)
            if self.group.rank == 0:
                self.stages.append(self._figures(drawn, reasons.get(stage.size)))
        assert drawing is not None, "there is at least one stage"
        return drawing

    def _figures(self, drawn: Drawing, why: str | None) -> report.StageFigures:
        """Of the stage that has just been drawn; on rank 0, which draws them all."""
        return report.StageFigures(
            grid=self.handle.grid,
            cut=self.handle.cut,
            stripes=self.handle.stripes,
            ranks=len(list(filter(len, drawn.rows))),
            times=self.phases.stages[-1],
            why=why,
        )

    def _start(self, request: Request) -> tuple[Drawing | None, Alpha | None]:
        """The picture to start from, and its alpha on rank 0."""
        if request.picture is None:
            return None, None
        image, alpha = None, None
        with alike(self.group):
            if self.group.rank == 0:
                image, alpha = load(request.picture)
        return from_image(image, self.group), None if alpha is None else Alpha(alpha, request.picture.background)

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

    def _encode(self, index: int) -> dict[str, Tensor]:
        encoded: Encoded = []
        if self.encoded is not None:
            encoded = self.encoded[index]
        elif self.group.rank == 0:
            (encoded,) = encode(self.pipe, self.request, [self.request.prompts[index]])
        adapter, counters = adapter_of(self.pipe), self.handle.counters
        return share(adapter, self.group, counters, encoded, num_images=self.request.num_images)

    def _end_step(self, pipe: Any, stage: Stage, done: int, latents: Tensor) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # else only the launch of the step's kernels is timed
        self.phases.end_step(done)
        if self.profile is not None:
            self.profile.after_step()
        if self.previews is not None:
            self.previews.after_step(pipe, stage, done, latents)

    def _settings(self, request: Request) -> dict[str, Any]:
        chosen = {"seed": self.seed, "text_attention": self.handle.text_attention, "transport": self.group.transport}
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
        ranks = self.group.gather_objects(figures)
        if self.group.rank != 0:
            return
        contents = report.build(
            seed=self.seed,
            settings=self._settings(self.request),
            times=self.phases.times,
            launch=self.launch,
            total=time.time() - self.began,
            stages=self.stages,
            ranks=ranks,
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
    writing = claimed(request) if rank == 0 else nullcontext()
    with writing as taken, watched(rank=rank, say=say, quiet=request.quiet) as phases, torch.inference_mode():
        rendering = Rendering(request, began, phases, taken)
        with rendering.compile_time.measuring(), unwinding():  # from here on files are written
            rendering.run()
    rendering.handle.close()
    rendering.group.close()
