"""Routes of jobs and of their results, which are sent from the disk."""

from pathlib import Path as File
from typing import Annotated

from fastapi import FastAPI, Path, Query
from fastapi.responses import FileResponse, JSONResponse, Response

from clear_dist.serving.answers import MEDIA_TYPES
from clear_dist.serving.errors import ApiError
from clear_dist.serving.service import Service, no_such_job
from clear_dist.serving.store import Record

HEADERS = {"X-Content-Type-Options": "nosniff", "Cache-Control": "private, max-age=3600"}

Name = Annotated[str, Path(max_length=100)]


def add_job_routes(app: FastAPI, service: Service) -> None:
    @app.get("/v1/jobs")
    def jobs(limit: Annotated[int, Query(ge=1, le=100)] = 20) -> dict[str, object]:
        """The last jobs, the newest first."""
        return {"object": "list", "data": service.newest(limit)}

    @app.get("/v1/jobs/{name}")
    def job(name: Name) -> Record:
        """State, stage, step and time left of a job."""
        return service.record(name)

    @app.delete("/v1/jobs/{name}")
    def cancel(name: Name) -> JSONResponse:
        """Stop a job after the running step, or remove one that has ended, with its pictures."""
        return JSONResponse(service.cancel(name), 202 if name in service.jobs else 200)

    @app.get("/v1/jobs/{name}/preview", response_class=Response)
    def preview(name: Name) -> Response:
        """How a running job's first picture may become."""
        running = service.jobs.get(name)
        if running is None or running.preview is None:
            raise no_such_job() if running is None else ApiError(404, "there is no preview as yet", code="no_preview")
        media_type = MEDIA_TYPES[running.files[0].suffix]
        return Response(running.preview, media_type=media_type, headers={"Cache-Control": "no-store"})

    @app.get("/v1/results/{name}/{picture}", response_class=FileResponse)
    def result(name: Name, picture: Name) -> FileResponse:
        """A picture, as it lies on the disk."""
        file = picture_file(service, name, picture)
        return FileResponse(file, media_type=MEDIA_TYPES[file.suffix], headers=HEADERS)


def picture_file(service: Service, name: str, picture: str) -> File:
    """A job's picture on the disk; raises ApiError for what is none."""
    record = service.store.read(name)
    file = service.store.folder_of(name) / picture
    if record is None or f"/v1/results/{name}/{picture}" not in record["images"] or not file.is_file():
        raise ApiError(404, "there is no such picture here, or it has made room for others", code="result_not_found")
    return file
