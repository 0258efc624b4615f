"""Rank 0's side of drawing: jobs become tasks, and hear how far they are."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from clear_dist import __version__
from clear_dist.request.request import Request
from clear_dist.serving.draw import Inputs
from clear_dist.serving.errors import CANCELLED, TOO_LONG, ApiError
from clear_dist.serving.jobs import Job, Queue
from clear_dist.serving.task import Task
from clear_dist.stages import Stage


@dataclass(frozen=True, kw_only=True)
class JobWatch:
    job: Job
    most_seconds: float

    def is_stopped(self) -> bool:
        return self.job.is_stopped or self.is_late

    @property
    def is_late(self) -> bool:
        return self.job.running_seconds > self.most_seconds

    def progress(self, stage: int, step: int, work: float) -> None:
        self.job.stage, self.job.step, self.job.work = stage, step, work

    def step(self, pipe: Any, stage: Stage, done: int, latents: Tensor) -> None:
        pass


@dataclass(frozen=True, kw_only=True)
class JobCommission:
    job: Job
    queue: Queue
    task: Task
    inputs: Inputs
    watch: JobWatch

    def end(self, error: ApiError | None) -> None:
        job = self.job
        if error is CANCELLED and self.watch.is_late:
            error = TOO_LONG
        for file in job.files if error is not None else ():
            file.unlink(missing_ok=True)
        self.queue.note(job.running_seconds)
        job.end(error)


def taking(queue: Queue, most_seconds: float) -> Callable[[float], JobCommission | None]:
    """What waits for the queue's next job, for at most so many seconds."""

    def next_task(seconds: float) -> JobCommission | None:
        job = queue.take(seconds)
        if job is None:
            return None
        watch = JobWatch(job=job, most_seconds=most_seconds)
        return JobCommission(job=job, queue=queue, task=job.task, inputs=inputs_of(job), watch=watch)

    return next_task


def inputs_of(job: Job) -> Inputs:
    request = job.request
    return Inputs(
        prompts=request.prompts,
        negative_prompt=request.negative_prompt,
        max_sequence_length=request.max_sequence_length,
        files=job.files,
        metadata=[metadata_of(request, index) for index in range(len(job.files))],
        compression=job.compression,
    )


def metadata_of(request: Request, index: int) -> dict[str, str]:
    """What a picture's file says of it, by which `upscale` knows the prompt."""
    settings = {"model": request.model_name, "stages": [asdict(stage) for stage in request.stages]}
    own = {
        "prompt": request.prompts[0],
        "seed": str(request.seed),
        "Software": f"clear-dist {__version__}",
        "image": str(index),
    }
    if request.negative_prompt is not None:
        own["negative_prompt"] = request.negative_prompt
    return own | {"settings": json.dumps(settings)}
