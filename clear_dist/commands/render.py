"""What each rank does for `generate` and `upscale`: load, encode, draw stage by stage, save, report."""

import json
import secrets
import shlex
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from clear_dist import loading, lora, report
from clear_dist.cascade import Cascade, Drawing, work_of
from clear_dist.comm import env
from clear_dist.comm.ends import say
from clear_dist.comm.group import Group
from clear_dist.comm.interrupts import unwinding
from clear_dist.commands.saving import Saving
from clear_dist.compile_time import CompileTime
from clear_dist.config import Refusal, Request
from clear_dist.config.request import Picture
from clear_dist.generation import from_image
from clear_dist.parallelize import Parallelized, parallelize
from clear_dist.pictures import preview_of, replacing
from clear_dist.preflight.pictures import load
from clear_dist.previews import Previews
from clear_dist.profiling import Profile
from clear_dist.progress import Phases, watched
from clear_dist.stages import Stage
from clear_dist.text import encode_prompts

SEED_BITS = 32
SAVING = 0.5
"""Of a denoising step, in time, on a CPU; for the time left only."""


@dataclass(frozen=True, kw_only=True)
class Rendering:
    """One request on one rank, its model loaded."""

    request: Request
    seed: int
    device: torch.device
    group: Group
    pipe: Any
    handle: Parallelized
    phases: Phases
    began: float
    launch: float
    """Seconds until the ranks were at work."""
    peak_since_loading: bool
    compile_time: CompileTime
    previews: Previews | None
    profile: Profile | None
    """Of the last stage of the first prompt."""
    stages: list[report.StageFigures] = field(default_factory=list)

    def run(self) -> None:
        """All pictures of the request, and its report."""
        request = self.request
        stages = request.stages
        self._require_room(stages[-1])
        saved = stages if request.save_stages else stages[-1:]
        work = sum(sum(work_of(stage).values()) for stage in stages) + sum(map(saving_work, saved))
        self.phases.expect(len(request.prompts) * work)
        latents = []
        for index in range(len(request.prompts)):
            drawing = self._render_prompt(index)
            assert drawing.latents is not None, "all ranks draw the last stage"
            if request.latents_out is not None and self.group.rank == 0:
                latents.append(drawing.latents.cpu())
        if request.latents_out is not None and latents:
            with self.phases.phase("save"), replacing(request.latents_out) as partial:
                partial.write_bytes(save({"latents": torch.cat(latents)}))
        if request.report is not None:
            self._report(request.report)

    def _require_room(self, stage: Stage) -> None:
        """Before the lower stages are drawn, rather than after."""
        sampling, batch = stage.sampling, self.request.num_images
        self.handle.require_room(*self._grid(stage), batch=batch, passes=sampling.passes, steps=sampling.steps)

    def _grid(self, stage: Stage) -> tuple[int, int]:
        """Height and width in tokens."""
        token = self.request.token_size
        return stage.height // token, stage.width // token

    def _render_prompt(self, index: int) -> Drawing:
        """All stages of one prompt, their pictures saved; returns the last one."""
        request, began, count = self.request, time.perf_counter(), len(self.request.prompts)
        saving = Saving(
            request=request, settings=self._settings(), seed=self.seed, group=self.group, prompt=index, began=began
        )
        detail = f", prompt {index + 1} of {count}" if count > 1 else ""
        with self.phases.phase("text", detail=detail):
            embeddings = self._encode(request.prompts[index])
        native_size = self.pipe.vae.config.sample_size
        cascade = Cascade(
            self.pipe, embeddings, seed=self.seed, native_size=native_size, phases=self.phases, on_step=self._end_step
        )
        stages = request.stages
        drawing = None if request.picture is None else self._user_picture(request.picture)
        for number, stage in enumerate(stages):
            of_several = f", stage {number + 1} of {len(stages)}" if len(stages) > 1 else ""
            last = number == len(stages) - 1
            profile = self.profile if last and index == 0 else None
            self.phases.begin_stage()
            with nullcontext() if profile is None else profile.recording():
                drawing = cascade.draw(stage, drawing, detail=f"{detail}{of_several}")
            if last or request.save_stages:
                with self.phases.phase("save", detail=f"{detail}{of_several}", work=saving_work(stage)):
                    saving.save(drawing, last=last)
            if profile is not None:
                with self.phases.phase("save", detail=", the profile"):
                    self._write_profile(profile)
            self._note(stage, drawing)
        assert drawing is not None, "there is at least one stage"
        return drawing

    def _write_profile(self, profile: Profile) -> None:
        """Each rank its own; told in one line, once all are there."""
        profile.write()
        self.group.barrier()
        if self.group.rank == 0:
            first = shlex.quote(str(self.request.traces[0]))
            print(f"profile={first} ranks={self.group.size} steps={profile.steps}", flush=True)

    def _encode(self, prompt: str) -> dict[str, Tensor]:
        request = self.request
        if self.group.rank == 0:
            for line in loading.cut_off(self.pipe, prompt, request.max_sequence_length):
                say(f"warning: {line}")
        guided = max(stage.sampling.passes for stage in request.stages) > 1
        negative = request.negative_prompt if guided else None
        return encode_prompts(
            self.pipe,
            self.group,
            self.handle.counters,
            [prompt],
            negative_prompts=None if negative is None else [negative],
            max_sequence_length=request.max_sequence_length,
            num_images=request.num_images,
        )

    def _user_picture(self, picture: Picture) -> Drawing:
        return from_image(load(picture) if self.group.rank == 0 else None, self.group)

    def _end_step(self, pipe: Any, stage: Stage, done: int, latents: Tensor) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # else the launch of the step's kernels is timed, not the step
        self.phases.end_step(done)
        if self.profile is not None:
            self.profile.after_step()
        if self.previews is not None:
            self.previews.after_step(pipe, stage, done, latents)

    def _note(self, stage: Stage, drawing: Drawing) -> None:
        """Keep what the report tells of a stage."""
        token = self.request.token_size
        figures = report.StageFigures(
            grid=self._grid(stage),
            stripes=[(rows.start // token, rows.stop // token) for rows in drawing.rows if len(rows)],
            times=self.phases.stages[-1],
        )
        self.stages.append(figures)

    def _settings(self) -> dict[str, Any]:
        """The request as plain values, with what this run has chosen: settings that make the picture again."""
        chosen = {"seed": self.seed, "text_attention": self.handle.text_attention, "transport": self.group.transport}
        return json.loads(json.dumps(asdict(self.request), default=str)) | chosen

    def _report(self, file: Path) -> None:
        figures = report.RankFigures(
            peak_memory_bytes=report.peak_memory(self.device),
            peak_since_loading=self.peak_since_loading,
            stale_buffer_bytes=self.handle.stale_buffer_bytes,
            compile_seconds=self.compile_time.seconds,
            comm=self.handle.counters.as_dict(),
        )
        ranks = self.group.gather_objects(figures)
        if self.group.rank != 0:
            return
        contents = report.build(
            seed=self.seed,
            settings=self._settings(),
            times=self.phases.times,
            launch=self.launch,
            total=time.time() - self.began,
            stages=self.stages,
            ranks=ranks,
        )
        report.write(contents, file)


def saving_work(stage: Stage) -> float:
    """As `work_of`."""
    return SAVING * stage.height * stage.width


def render(request: Request, began: float) -> None:
    """Make the pictures of `request` together with the other ranks, if there are any.

    Args:
        began: wall clock at which the command was given, for the time that starting took.

    Raises:
        Refusal: only the loaded model could tell that the request is wrong.
    """
    with watched(rank=env.read().rank) as phases, torch.inference_mode():
        rendering = _prepare(request, began, phases)
        with rendering.compile_time.measuring(), unwinding():  # from here on files are written
            rendering.run()
    rendering.group.close()


def _prepare(request: Request, began: float, phases: Phases) -> Rendering:
    place = env.read()
    if place.threads is not None:
        torch.set_num_threads(place.threads)  # torch may have been imported before the share was known
    device = _device(request.device, place.local_rank)
    group = Group.create(device)
    launch = time.time() - began
    with phases.phase("load"):
        request = loading.locate(request, group, local_rank=place.local_rank)
        pipe = loading.load_pipeline(
            Path(request.model),
            with_text_encoders=group.rank == 0,
            dtype=getattr(torch, request.dtype),
            device=device,
        )
        handle = _parallelize(pipe, request, group)
        lora.load(pipe, lora.locate(request.loras, group, local_rank=place.local_rank))
    seed = group.broadcast_object(secrets.randbits(SEED_BITS) if request.seed is None else request.seed)
    torch.manual_seed(seed)
    every = request.preview_every
    return Rendering(
        request=request,
        seed=seed,
        device=device,
        group=group,
        pipe=pipe,
        handle=handle,
        phases=phases,
        began=began,
        launch=launch,
        peak_since_loading=report.reset_peak_memory(device),
        compile_time=CompileTime(),
        previews=None if every is None or group.rank != 0 else Previews(preview_of(request.output), every),
        profile=_profile(request, group, handle),
    )


def _profile(request: Request, group: Group, handle: Parallelized) -> Profile | None:
    if request.profile is None:
        return None
    steps = request.stages[-1].sampling.steps
    return Profile(request.traces[group.rank], group.rank, steps=steps, drain=handle.drain)


def _parallelize(pipe: Any, request: Request, group: Group) -> Parallelized:
    try:
        return parallelize(
            pipe,
            window=request.window,
            clear_weights=request.clear_weights,
            text_attention=request.text_attention,
            attention_backend=request.attention_backend,
            schedule=request.schedule,
            warmup_steps=request.warmup_steps,
            hoist_modulation=request.hoist_modulation,
            compile=request.compile,
            float8=request.float8,
            group=group,
        )
    except ValueError as error:
        raise Refusal(str(error)) from error


def _device(kind: str, local_rank: int) -> torch.device:
    return torch.device(kind, local_rank % torch.cuda.device_count()) if kind == "cuda" else torch.device(kind)
