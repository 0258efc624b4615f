"""Figures of a server for Prometheus; none of them names a client or a prompt."""

from collections.abc import Callable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from clear_dist.serving.jobs import Job, State

SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 1_800)
"""Bounds of the histograms' buckets."""


class Metrics:
    def __init__(self, waiting: Callable[[], int], running: Callable[[], int]) -> None:
        self._registry = CollectorRegistry()
        own: dict[str, Any] = {"registry": self._registry, "namespace": "clear_dist"}
        self._answers = Counter("http_answers", "HTTP answers by status", ["status"], **own)
        self._jobs = Counter("jobs", "jobs by how they ended", ["state"], **own)
        self._pictures = Counter("pictures", "pictures drawn", **own)
        self._pixels = Counter("pixels", "pixels drawn", **own)
        self._drawing = Histogram("drawing_seconds", "seconds from a job's first step on", buckets=SECONDS, **own)
        self._waiting = Histogram("waiting_seconds", "seconds that a job waited before", buckets=SECONDS, **own)
        Gauge("jobs_waiting", "jobs that wait", **own).set_function(waiting)
        Gauge("jobs_running", "jobs that are drawn", **own).set_function(running)

    def answered(self, status: int) -> None:
        self._answers.labels(str(status)).inc()

    def ended(self, job: Job) -> None:
        """Note a job that has ended."""
        self._jobs.labels(job.state).inc()
        if job.state is State.SUCCEEDED and job.seconds is not None:
            height, width = job.request.size
            self._pictures.inc(len(job.files))
            self._pixels.inc(len(job.files) * height * width)
            self._drawing.observe(job.seconds)
            self._waiting.observe(job.waited)

    def text(self) -> bytes:
        """All of them, in Prometheus' text format."""
        return generate_latest(self._registry)
