"""A server as its routes see it: what it holds, who may ask, and how a request becomes a job."""

import secrets
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clear_dist.request.serve import ServeFlags
from clear_dist.serving.errors import ApiError
from clear_dist.serving.jobs import Full, Job, Queue
from clear_dist.serving.schema import Drawn
from clear_dist.serving.settled import Shapes, Start, files_of

ID_BYTES = 16
"""Random, so that nobody guesses a job's name."""


@dataclass(kw_only=True)
class Service:
    start: Start
    queue: Queue
    shapes: Shapes
    folder: Path
    """Of results."""
    jobs: dict[str, Job] = field(default_factory=dict)
    is_ready: bool = False
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def flags(self) -> ServeFlags:
        return self.start.flags

    def submit(self, asked: Drawn) -> Job:
        """The job of a request, which waits from now on; raises ApiError. It may take seconds."""
        self._check(asked)
        name = f"job_{secrets.token_urlsafe(ID_BYTES)}"
        folder = self.folder / name
        folder.mkdir(parents=True)
        try:
            request = self.shapes.settled(asked, folder / f"picture{asked.ending}")
            job = Job(
                id=name,
                request=request,
                asked=shown(asked, request),
                files=files_of(request),
                compression=asked.output_compression,
                partial_images=asked.partial_images or 0,
            )
            self.queue.put([job])
        except Full:
            shutil.rmtree(folder)
            raise busy(self.queue) from None
        except BaseException:
            shutil.rmtree(folder)
            raise
        self.jobs[name] = job
        return job

    def _check(self, asked: Drawn) -> None:
        if not self.is_ready:
            raise ApiError(503, "the model is being loaded", code="loading", headers={"Retry-After": "5"})
        if asked.model not in (None, "", self.start.model_name):
            message = f"the model must be {self.start.model_name!r} here, or left out"
            raise ApiError(404, message, param="model", code="model_not_found")
        asked.check(self.flags)
        if len(self.queue) >= self.flags.max_queue:  # before a plan is made
            raise busy(self.queue)


def busy(queue: Queue) -> ApiError:
    seconds = str(round(queue.seconds_to_wait))
    return ApiError(429, "too many requests wait here; come back later", code="busy", headers={"Retry-After": seconds})


def shown(asked: Drawn, request: Any) -> dict[str, Any]:
    """Parameters of a job that its client may be shown, with what was chosen."""
    height, width = request.size
    given = asked.model_dump(exclude_none=True, exclude={"user", "safety_identifier", "stream", "partial_images"})
    return given | {"seed": request.seed, "size": f"{width}x{height}", "n": request.num_images}
