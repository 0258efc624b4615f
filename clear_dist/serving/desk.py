"""Rank 0's side of drawing: jobs become tasks, and hear how far they are."""

import io
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL.Image import Image
from torch import Tensor

from clear_dist import __version__
from clear_dist.drawing.previews import Previews
from clear_dist.pictures.srgb import profile
from clear_dist.request.request import Request
from clear_dist.serving.answers import FORMATS
from clear_dist.serving.draw import Inputs
from clear_dist.serving.errors import CANCELLED, TOO_LONG, ApiError
from clear_dist.serving.jobs import Job, Queue
from clear_dist.serving.task import Task
from clear_dist.stages import Stage


class Shown(Previews):
    """Previews for a job's followers, of its first picture."""

    def __init__(self, job: Job) -> None:
        steps = sum(stage.sampling.steps for stage in job.request.stages)
        super().__init__(job.files[0], every=max(1, steps // (job.previews + 1)))
        self._job, self._left = job, job.previews

    def after_step(self, pipe: Any, stage: Stage, done: int, latents: Tensor) -> None:
        if self._left:
            super().after_step(pipe, stage, done, latents)

    def _keep(self, picture: Image) -> None:
        self._left -= 1
        encoded = io.BytesIO()
        picture.save(encoded, FORMATS[self._file.suffix], icc_profile=profile())
        self._job.show(encoded.getvalue())


@dataclass(frozen=True, kw_only=True)
class JobWatch:
    job: Job
    most_seconds: float
    previews: Shown

    def is_stopped(self) -> bool:
        return self.job.is_stopped or self.is_late

    @property
    def is_late(self) -> bool:
        return self.job.running_seconds > self.most_seconds

    def progress(self, stage: int, step: int, work: float) -> None:
        self.job.stage, self.job.step, self.job.work = stage, step, work

    def step(self, pipe: Any, stage: Stage, done: int, latents: Tensor) -> None:
        self.previews.after_step(pipe, stage, done, latents)


@dataclass(frozen=True, kw_only=True)
class JobCommission:
    job: Job
    queue: Queue
    watch: JobWatch

    @property
    def task(self) -> Task:
        return self.job.task

    @property
    def inputs(self) -> Inputs:
        job, request = self.job, self.job.request
        return Inputs(
            prompts=request.prompts,
            negative_prompt=request.negative_prompt,
            max_sequence_length=request.max_sequence_length,
            picture=request.picture,
            files=job.files,
            metadata=[metadata_of(request, index) for index in range(len(job.files))],
            compression=job.compression,
        )

    def end(self, error: ApiError | None) -> None:
        job = self.job
        if error is CANCELLED and self.watch.is_late and not job.is_stopped:
            error = TOO_LONG
        for file in job.files if error is not None else ():
            file.unlink(missing_ok=True)
        self.queue.note(job.running_seconds)
        job.end(error)


@dataclass(frozen=True, kw_only=True)
class Desk:
    """What rank 0 draws next."""

    queue: Queue
    most_seconds: float
    count_tokens: Callable[[str], int]

    def next_task(self, seconds: float) -> JobCommission | None:
        """The queue's next job, waited for during at most so many seconds."""
        job = self.queue.take(seconds)
        if job is None:
            return None
        job.tokens = self.count_tokens(job.request.prompts[0])
        watch = JobWatch(job=job, most_seconds=self.most_seconds, previews=Shown(job))
        return JobCommission(job=job, queue=self.queue, watch=watch)


def metadata_of(request: Request, index: int) -> dict[str, str]:
    """What a picture's file says of it, by which `upscale` knows the prompt."""
    settings = {"model": Path(request.model_name).name, "stages": [asdict(stage) for stage in request.stages]}
    own = {
        "prompt": request.prompts[0],
        "seed": str(request.seed),
        "Software": f"clear-dist {__version__}",
        "image": str(index),
    }
    if request.negative_prompt is not None:
        own["negative_prompt"] = request.negative_prompt
    return own | {"settings": json.dumps(settings)}
