"""Jobs of a server: what was asked for, how far it is, and who waits for it. Safe between threads."""

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from clear_dist.request.request import Request
from clear_dist.serving.errors import CANCELLED, ApiError
from clear_dist.serving.task import Task

AT_LEAST_SECONDS = 1.0


class State(StrEnum):
    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_final(self) -> bool:
        return self in (State.SUCCEEDED, State.FAILED, State.CANCELLED)


class Full(Exception):
    """More wait than may."""


@dataclass(eq=False, kw_only=True)
class Job:
    """Pictures of one client. HTTP's thread makes it and may stop it; the drawing thread does all else."""

    id: str
    request: Request
    asked: dict[str, Any]
    """Parameters that may be shown."""
    files: tuple[Path, ...]
    """The pictures, in their order."""
    compression: int | None = None
    previews: int = 0
    """Wanted while it is drawn."""
    is_kept: bool = False
    """Whether nobody waits for it, so that it outlives this server."""
    attempts: int = 1
    on_end: Callable[["Job"], None] = lambda job: None
    created: float = field(default_factory=time.time)
    state: State = State.QUEUED
    stage: int = 0
    step: int = 0
    """Steps done of the stage."""
    work: float = 0.0
    """Share of all work that is done."""
    seconds: float | None = None
    """Of drawing, once it has ended."""
    waited: float = 0.0
    """Seconds before it was begun."""
    tokens: int = 0
    """Of the prompt's text."""
    error: ApiError | None = None
    preview: bytes | None = None
    """The last one."""
    _began: float | None = field(default=None, init=False)
    _is_stopped: bool = field(default=False, init=False)
    _followers: list[tuple[asyncio.AbstractEventLoop, "asyncio.Queue[bytes | None]"]] = field(
        default_factory=list, init=False
    )
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False)

    @property
    def task(self) -> Task:
        request = self.request
        assert request.seed is not None, "drawn where it was not given"
        picture = request.picture
        return Task(
            stages=request.stages,
            seeds=(request.seed,),
            images=(request.num_images,),
            loras=tuple((Path(lora.source).name, lora.weight) for lora in request.loras),
            start="noise" if picture is None else "looks" if request.looks else "picture",
            has_mask=picture is not None and picture.mask is not None,
        )

    @property
    def is_stopped(self) -> bool:
        """Whether nobody wants it any more."""
        return self._is_stopped

    @property
    def running_seconds(self) -> float:
        return 0.0 if self._began is None else time.monotonic() - self._began

    @property
    def seconds_left(self) -> float | None:
        """Estimate by the work that is done; None where nobody can know."""
        return self.running_seconds * (1 / self.work - 1) if self.state is State.RUNNING and self.work else None

    def stop(self) -> None:
        self._is_stopped = True

    def begin(self) -> None:
        self.waited = time.time() - self.created
        self.state, self._began = State.RUNNING, time.monotonic()

    def end(self, error: ApiError | None = None) -> None:
        """End it, cancelled or failed where there is an error, and tell all followers."""
        self.seconds = self.running_seconds
        self.error, self.preview = error, None
        self.state = State.SUCCEEDED if error is None else State.CANCELLED if error is CANCELLED else State.FAILED
        self.on_end(self)
        self._tell(None)

    def show(self, preview: bytes) -> None:
        """Tell followers of a preview, a picture in the format of the job's."""
        self.preview = preview
        self._tell(preview)

    @contextmanager
    def followed(self) -> Iterator["asyncio.Queue[bytes | None]"]:
        """Previews from now on, and None at the end; for a coroutine."""
        follower = asyncio.get_running_loop(), asyncio.Queue[bytes | None]()
        with self._lock:
            self._followers.append(follower)
        if self.state.is_final:
            follower[1].put_nowait(None)
        try:
            yield follower[1]
        finally:
            with self._lock:
                self._followers.remove(follower)

    def _tell(self, word: bytes | None) -> None:
        with self._lock:
            followers = list(self._followers)
        for loop, queue in followers:
            with suppress(RuntimeError):  # the server has ended meanwhile
                loop.call_soon_threadsafe(queue.put_nowait, word)


class Queue:
    """Jobs that wait, first come, first served; the drawing thread takes them."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._jobs: deque[Job] = deque()
        self._changed = threading.Condition()
        self._lasted: deque[float] = deque(maxlen=16)

    def __len__(self) -> int:
        return len(self._jobs)

    def put(self, jobs: Sequence[Job]) -> None:
        """Raises Full where not all of them find room."""
        with self._changed:
            if len(self._jobs) + len(jobs) > self._most:
                raise Full
            self._jobs.extend(jobs)
            self._changed.notify()

    def take(self, seconds: float) -> Job | None:
        """The next job that somebody wants, begun; None where none comes within so many seconds."""
        with self._changed:
            self._changed.wait_for(lambda: bool(self._jobs), seconds)
            while self._jobs:
                job = self._jobs.popleft()
                if not job.is_stopped:
                    job.begin()
                    return job
            return None

    def stop(self, job: Job) -> None:
        """Take it out at once, or have it stop after the running step."""
        with self._changed:
            job.stop()
            if job not in self._jobs:
                return
            self._jobs.remove(job)
        job.end(CANCELLED)

    def note(self, seconds: float) -> None:
        """Note how long a job has taken."""
        self._lasted.append(seconds)

    @property
    def seconds_to_wait(self) -> float:
        """Time until there may be room, as far as the last jobs tell."""
        usual = sum(self._lasted) / len(self._lasted) if self._lasted else AT_LEAST_SECONDS
        return max(AT_LEAST_SECONDS, usual)
