"""Answers with pictures: JSON whose base64 is read from the disk piece by piece, so that none is whole in memory."""

import base64
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from clear_dist.serving.jobs import Job

PIECE = 3 * 2**16
"""Bytes read at once, in threes, so that pieces of base64 lie side by side."""
FORMATS = {".png": "png", ".jpg": "jpeg", ".webp": "webp"}
MEDIA_TYPES = {".png": "image/png", ".jpg": "image/jpeg", ".webp": "image/webp"}
HOLE = "\0"
USUAL = "medium"
QUALITIES = {"auto": USUAL, "standard": USUAL, "hd": "high"}
"""What answers call those that only requests name."""


def usage_of(job: Job, images: int) -> dict[str, Any]:
    """Tokens of the prompt, and those of so many pictures."""
    height, width = job.request.size
    drawn = images * (height // job.request.token_size) * (width // job.request.token_size)
    return {
        "input_tokens": job.tokens,
        "input_tokens_details": {"text_tokens": job.tokens, "image_tokens": 0},
        "output_tokens": drawn,
        "output_tokens_details": {"text_tokens": 0, "image_tokens": drawn},
        "total_tokens": job.tokens + drawn,
    }


def about(job: Job) -> dict[str, Any]:
    """What OpenAI's answers say of all pictures."""
    quality = job.asked.get("quality", USUAL)
    return {
        "background": "opaque",
        "output_format": FORMATS[job.files[0].suffix],
        "quality": QUALITIES.get(quality, quality),
        "size": job.asked["size"],
    }


def response_of(job: Job, data: list[dict[str, Any]]) -> dict[str, Any]:
    """An `ImagesResponse`, and the seed, which draws the same again."""
    found = {"created": int(job.created), "data": data, "usage": usage_of(job, len(job.files)), **about(job)}
    return found | {"id": job.id, "seed": job.request.seed}


def with_urls(job: Job, base: str) -> dict[str, Any]:
    return response_of(job, [{"url": f"{base}/v1/results/{job.id}/{file.name}"} for file in job.files])


def with_base64(job: Job) -> Iterator[bytes]:
    """The response as JSON, its pictures read while it is sent."""
    yield from _filled(response_of(job, [{"b64_json": HOLE} for _ in job.files]), job.files)


def completed(job: Job, index: int) -> Iterator[bytes]:
    """The event that ends a stream, for one picture."""
    kind, name = "image_generation.completed", job.files[index]
    event = {"type": kind, "b64_json": HOLE, "created_at": int(time.time()), **about(job), "usage": usage_of(job, 1)}
    yield f"event: {kind}\ndata: ".encode()
    yield from _filled(event, (name,))
    yield b"\n\n"


def partial(job: Job, index: int, preview: bytes) -> bytes:
    kind = "image_generation.partial_image"
    event = {"type": kind, "b64_json": base64.b64encode(preview).decode(), "partial_image_index": index}
    return event_of(kind, event | {"created_at": int(time.time()), **about(job), "output_format": "png"})


def event_of(kind: str, fields: dict[str, Any]) -> bytes:
    return f"event: {kind}\ndata: {json.dumps(fields)}\n\n".encode()


def _filled(fields: dict[str, Any], files: tuple[Path, ...]) -> Iterator[bytes]:
    """JSON of `fields`, each HOLE filled with a file."""
    first, *others = json.dumps(fields).split(json.dumps(HOLE).strip('"'))
    assert len(others) == len(files), "a hole for each"
    yield first.encode()
    for file, after in zip(files, others, strict=True):
        with file.open("rb") as stream:
            while piece := stream.read(PIECE):
                yield base64.b64encode(piece)
        yield after.encode()
