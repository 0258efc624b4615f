"""The page at `/`, its parts, and tiles of pictures; all of it from here, and no script from elsewhere."""

from pathlib import Path as File
from typing import Annotated

from fastapi import FastAPI, Path
from fastapi.responses import FileResponse

from clear_dist.serving.errors import ApiError
from clear_dist.serving.job_routes import HEADERS, Name, picture_file
from clear_dist.serving.service import Service
from clear_dist.serving.tiles import Pyramids

FOLDER = File(__file__).parent / "page"
PARTS = {"page.css": "text/css", "page.js": "text/javascript", "viewer.js": "text/javascript"}
POLICY = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' blob:; frame-ancestors 'none'; base-uri 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}

Number = Annotated[int, Path(ge=0, le=1_000)]


def add_page_routes(app: FastAPI, service: Service) -> None:
    pyramids = Pyramids()

    @app.get("/", include_in_schema=False)
    def page() -> FileResponse:
        return FileResponse(FOLDER / "index.html", media_type="text/html", headers=POLICY)

    @app.get("/page/{name}", include_in_schema=False)
    def part(name: str) -> FileResponse:
        if name not in PARTS:
            raise ApiError(404, "there is no such part of the page")
        return FileResponse(FOLDER / name, media_type=PARTS[name], headers=POLICY)

    @app.get("/v1/results/{name}/{picture}/tiles/{level}/{column}/{row}", response_class=FileResponse)
    def tile(name: Name, picture: Name, level: Number, column: Number, row: Number) -> FileResponse:
        """A tile of a picture, 512 px wide and high: level 0 in its own size, each further one half as large."""
        found = pyramids.tile(picture_file(service, name, picture), level, column, row)
        if found is None:
            raise ApiError(404, "the picture has no such tile", code="result_not_found")
        return FileResponse(found, media_type="image/jpeg", headers=HEADERS)
