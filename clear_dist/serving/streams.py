"""Events of a job for a client that listens: pictures as they come about, then as they are."""

from collections.abc import AsyncIterator, Iterator

from fastapi import Request
from fastapi.concurrency import iterate_in_threadpool

from clear_dist.serving import answers
from clear_dist.serving.following import previews
from clear_dist.serving.jobs import Job, Queue

HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
"""So that no proxy keeps events back."""


async def events(job: Job, request: Request, queue: Queue) -> AsyncIterator[bytes]:
    """Server-sent events, OpenAI's."""
    index = 0
    async for preview in previews(job, request, queue):
        yield answers.partial(job, index, preview)
        index += 1
    if not job.state.is_final:  # its client has gone
        return
    if job.error is not None:
        yield answers.event_of("error", job.error.body())
        return
    async for piece in iterate_in_threadpool(_completed(job)):
        yield piece


def _completed(job: Job) -> Iterator[bytes]:
    for index in range(len(job.files)):
        yield from answers.completed(job, index)
