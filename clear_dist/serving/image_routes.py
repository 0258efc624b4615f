"""Routes that draw, as OpenAI has them; `async` makes a job of each."""

from collections.abc import Mapping
from typing import Annotated, Any

from fastapi import FastAPI, Header, Query, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, Response, StreamingResponse

from clear_dist.serving import answers, following, streams
from clear_dist.serving.errors import ApiError
from clear_dist.serving.jobs import State
from clear_dist.serving.records import record_of
from clear_dist.serving.schema import Drawn, Edit, Generation
from clear_dist.serving.service import NO_PICTURES, Service
from clear_dist.serving.uploads import edit_of

RESPOND_ASYNC = "respond-async"

Asynchronous = Annotated[bool, Query(alias="async", description="answer at once, with a job")]
Prefer = Annotated[str | None, Header(description=f"{RESPOND_ASYNC}: answer at once, with a job")]


def add_image_routes(app: FastAPI, service: Service) -> None:
    @app.post("/v1/images/generations", response_model=None)
    async def generate(
        asked: Generation, request: Request, is_async: Asynchronous = False, prefer: Prefer = None
    ) -> Response:
        """Pictures of a prompt."""
        is_kept = is_async or wants_job(prefer)
        return await answered(service, asked, request, is_kept=is_kept)

    @app.post("/v1/images/edits", response_model=None, openapi_extra={"requestBody": form_schema()})
    async def edit(request: Request, is_async: Asynchronous = False, prefer: Prefer = None) -> Response:
        """Pictures that begin with the client's, or are made of it."""
        asked, pictures = await edit_of(request)
        return await answered(service, asked, request, pictures, is_kept=is_async or wants_job(prefer))


def form_schema() -> dict[str, Any]:
    """The form of an edit, for the document of the API."""
    schema = Edit.model_json_schema()
    for definition in schema.pop("$defs", {}).values():
        schema["properties"]["lora"] = {"type": "string", "description": f"JSON: a list of {definition['title']}"}
    picture = {"type": "string", "format": "binary"}
    schema["properties"] |= {"image": picture, "mask": picture}
    schema["required"] = ["image", "prompt"]
    return {"required": True, "content": {"multipart/form-data": {"schema": schema}}}


def wants_job(prefer: str | None) -> bool:
    return prefer is not None and RESPOND_ASYNC in (each.strip().lower() for each in prefer.split(","))


async def answered(
    service: Service,
    asked: Drawn,
    request: Request,
    pictures: Mapping[str, bytes] = NO_PICTURES,
    *,
    is_kept: bool,
) -> Response:
    """What the client wants of a request: a job, events, links, or the pictures themselves."""
    if is_kept and asked.stream:
        raise ApiError(400, "stream is for requests that are waited for, got async too; leave one out", param="stream")
    job = await run_in_threadpool(service.submit, asked, pictures, is_kept=is_kept)
    if is_kept:
        headers = {"Location": f"/v1/jobs/{job.id}", "Preference-Applied": RESPOND_ASYNC}
        return JSONResponse(record_of(job), 202, headers)
    if asked.stream:
        events = streams.events(job, request, service.queue)
        return StreamingResponse(events, media_type="text/event-stream", headers=streams.HEADERS)
    await following.ended(job, request, service.queue)
    if job.state is not State.SUCCEEDED:
        raise job.error or ApiError(409, "the client has gone")
    if asked.response_format == "url":
        return JSONResponse(answers.with_urls(job, str(request.base_url).rstrip("/")))
    return StreamingResponse(answers.with_base64(job), media_type="application/json")
