"""Clients that wait for a job: until it ends, or until they are gone, which ends it."""

import asyncio
from collections.abc import AsyncIterator

from fastapi import Request

from clear_dist.serving.jobs import Job, Queue

SECONDS_BETWEEN_LOOKS = 0.25


async def previews(job: Job, request: Request, queue: Queue) -> AsyncIterator[bytes]:
    """Previews until the job has ended; it is stopped where its client goes away before."""
    try:
        with job.followed() as words:
            while True:
                try:
                    word = await asyncio.wait_for(words.get(), SECONDS_BETWEEN_LOOKS)
                except TimeoutError:
                    if await request.is_disconnected():
                        return
                    continue
                if word is None:
                    return
                yield word
    finally:
        if not job.state.is_final:
            queue.stop(job)


async def ended(job: Job, request: Request, queue: Queue) -> None:
    """Wait until it has ended; it has been stopped where its client has gone."""
    async for _ in previews(job, request, queue):
        pass
