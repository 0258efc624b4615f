"""A server as its routes see it: what it holds, who may ask, and how a request becomes a job."""

import secrets
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

from clear_dist.launch.ends import Failure, say
from clear_dist.request.request import Request
from clear_dist.request.serve import ServeFlags
from clear_dist.serving.errors import ApiError
from clear_dist.serving.jobs import Full, Job, Queue, State
from clear_dist.serving.metrics import Metrics
from clear_dist.serving.records import record_of
from clear_dist.serving.schema import Drawn, Edit, Generation
from clear_dist.serving.settled import Shapes, Start, files_of
from clear_dist.serving.store import Record, Store
from clear_dist.serving.uploads import PARTS, written

ID_BYTES = 16
"""Random, so that nobody guesses a job's name."""
PREVIEWS = 3
"""Of a job that somebody may look at."""
MOST_ATTEMPTS = 5
"""A job that may be what its server ended by is not begun for ever."""
LEAVING = ApiError(503, "the server is being ended", code="ending")
LARGER_BY = 4
"""Pixels of a picture to start from, for each that may be drawn."""
NO_PICTURES: Mapping[str, bytes] = MappingProxyType({})
WARM_UP = "warm-up"


@dataclass(kw_only=True)
class Service:
    start: Start
    queue: Queue
    shapes: Shapes
    store: Store
    jobs: dict[str, Job] = field(default_factory=dict)
    """Those that have not ended."""
    metrics: Metrics = field(init=False)
    is_ready: bool = False
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self.metrics = Metrics(self.queue.__len__, self._count_running)

    @property
    def flags(self) -> ServeFlags:
        return self.start.flags

    def warm_up(self) -> None:
        """Have a step drawn before anybody is answered; then go on with jobs that a server of before has left."""
        request = self.start.request
        short = replace(request, seed=0, num_images=1, sampling=replace(request.sampling, steps=1))
        file = self.store.folder_of(f"{WARM_UP}.png")

        def ready(job: Job) -> None:
            file.unlink(missing_ok=True)
            if job.error is not None:
                raise Failure(f"the model cannot draw: {job.error.message}")
            self.is_ready = True
            say("ready")

        size = {"size": "auto"}
        self.queue.put([Job(id=WARM_UP, request=short, asked=size, files=(file,), on_end=ready)])
        self._go_on()

    def submit(self, asked: Drawn, pictures: Mapping[str, bytes] = NO_PICTURES, *, is_kept: bool = False) -> Job:
        """The job of a request, which waits from now on; raises ApiError. It may take seconds.

        Args:
            pictures: to start from, by their names in the form.
            is_kept: nobody waits for it: it may take its time, and is begun again where its server has ended.
        """
        if not self.is_ready:
            raise ApiError(503, "the model is being loaded", code="loading", headers={"Retry-After": "5"})
        if asked.model not in (None, "", self.start.model_name):
            message = f"the model must be {self.start.model_name!r} here, or left out"
            raise ApiError(404, message, param="model", code="model_not_found")
        asked.check(self.flags)
        if len(self.queue) >= self.flags.max_queue:  # before a plan is made
            raise busy(self.queue)
        name = f"job_{secrets.token_urlsafe(ID_BYTES)}"
        return self._accepted(name, asked, pictures, is_kept=is_kept)

    def leave(self) -> None:
        """Tell all who wait that nothing will come; kept jobs are for the next server."""
        for job in list(self.jobs.values()):
            if not job.is_kept:
                job.end(LEAVING)

    def record(self, name: str) -> Record:
        """What is known of a job; raises ApiError."""
        job = self.jobs.get(name)
        record = self.store.read(name) if job is None else record_of(job)
        if record is None:
            raise no_such_job()
        return record

    def cancel(self, name: str) -> Record:
        """Stop a job, or remove one that has ended; raises ApiError."""
        record = self.record(name)
        job = self.jobs.get(name)
        if job is None:
            self.store.remove(name)
        else:
            self.queue.stop(job)
            record = record_of(job)
        return record

    def newest(self, count: int) -> list[Record]:
        """The last jobs, the newest first."""
        return [
            record if (job := self.jobs.get(record["id"])) is None else record_of(job)
            for record in self.store.newest(count)
        ]

    def _accepted(
        self, name: str, asked: Drawn, pictures: Mapping[str, bytes], *, is_kept: bool, attempts: int = 1
    ) -> Job:
        folder = self.store.folder_of(name)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            written(pictures, folder, LARGER_BY * self.flags.max_side**2)
            request = self.shapes.settled(asked, folder / f"picture{asked.ending}")
            job = Job(
                id=name,
                request=request,
                asked=shown(asked, request),
                files=files_of(request),
                compression=asked.output_compression,
                previews=asked.partial_images or 0 if asked.stream else PREVIEWS * is_kept,
                is_kept=is_kept,
                attempts=attempts,
                on_end=self._ended,
            )
            self.jobs[name] = job
            self._save(job)
            self.queue.put([job])
        except BaseException as error:
            self.jobs.pop(name, None)
            self.store.remove(name)
            shutil.rmtree(folder, ignore_errors=True)
            if isinstance(error, Full):
                raise busy(self.queue) from None
            raise
        return job

    def _count_running(self) -> int:
        return sum(job.state is State.RUNNING for job in list(self.jobs.values()))

    def _ended(self, job: Job) -> None:
        self._save(job)
        self.jobs.pop(job.id, None)
        self.metrics.ended(job)
        self.store.make_room(self.jobs.keys())

    def _save(self, job: Job) -> None:
        again = {"is_kept": job.is_kept, "attempts": job.attempts}
        self.store.save(job.id, record_of(job) | again)

    def _go_on(self) -> None:
        """Begin jobs again that had not ended when their server did."""
        for record in list(self.store.newest(self.flags.max_queue))[::-1]:
            if record["status"] not in ("queued", "running"):
                continue
            try:
                if not record.get("is_kept") or record.get("attempts", 1) >= MOST_ATTEMPTS:
                    raise ApiError(500, "the server ended before it")
                kind = Edit if (self.store.folder_of(record["id"]) / PARTS["image"]).exists() else Generation
                asked, attempts = kind(**record["asked"]), record.get("attempts", 1) + 1
                self._accepted(record["id"], asked, NO_PICTURES, is_kept=True, attempts=attempts)
            except (ApiError, ValueError, KeyError) as error:
                told = error if isinstance(error, ApiError) else ApiError(500, "the server ended before it")
                lost = record | {"status": "failed", "error": told.body()["error"], "preview": None}
                self.store.folder_of(record["id"]).mkdir(exist_ok=True)
                self.store.save(record["id"], lost)


def busy(queue: Queue) -> ApiError:
    seconds = str(round(queue.seconds_to_wait))
    return ApiError(429, "too many requests wait here; come back later", code="busy", headers={"Retry-After": seconds})


def no_such_job() -> ApiError:
    return ApiError(404, "there is no such job here", code="job_not_found")


def shown(asked: Drawn, request: Request) -> dict[str, Any]:
    """Parameters of a job as its client may be shown them, with what was chosen; they draw the same again."""
    height, width = request.size
    private = {"user", "safety_identifier", "stream", "partial_images", "response_format", "model"}
    given = asked.model_dump(exclude_none=True, exclude=private)
    return given | {"seed": request.seed, "size": f"{width}x{height}", "n": request.num_images}
