"""Routes of the server; what they do is elsewhere."""

import traceback
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException

from clear_dist import __version__
from clear_dist.launch.ends import describe, say
from clear_dist.serving.errors import BROKEN, ApiError, of_validation
from clear_dist.serving.guard import Guard, answer
from clear_dist.serving.image_routes import add_image_routes
from clear_dist.serving.job_routes import add_job_routes
from clear_dist.serving.page_routes import add_page_routes
from clear_dist.serving.service import Service

OWNER = "clear-dist"


def app_of(service: Service) -> FastAPI:
    """All routes, with what guards them."""
    app = FastAPI(title="clear-dist", version=__version__, docs_url=None, redoc_url=None)
    _tell_errors(app)
    _about_the_server(app, service)
    add_image_routes(app, service)
    add_job_routes(app, service)
    add_page_routes(app, service)
    app.add_middleware(
        Guard, key=service.start.key, most_bytes=service.flags.max_body * 10**6, on_answer=service.metrics.answered
    )
    return app


def _tell_errors(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def api_error(_: Request, error: ApiError) -> JSONResponse:
        return answer(error)

    @app.exception_handler(RequestValidationError)
    async def not_valid(_: Request, error: RequestValidationError) -> JSONResponse:
        return answer(of_validation(error.errors()))

    @app.exception_handler(HTTPException)
    async def of_http(_: Request, error: HTTPException) -> JSONResponse:
        return answer(ApiError(error.status_code, str(error.detail).lower(), headers=error.headers))

    @app.exception_handler(Exception)
    async def broken(_: Request, error: Exception) -> JSONResponse:
        say(f"a request failed: {describe(error)}")
        traceback.print_exception(error)  # to the server's log, not to its client
        return answer(ApiError(500, "the server failed; its log tells more", code=BROKEN))


def _about_the_server(app: FastAPI, service: Service) -> None:
    @app.get("/health")
    async def health() -> JSONResponse:
        """Whether pictures can be drawn now."""
        state = "ready" if service.is_ready else "loading"
        return JSONResponse({"status": state, "queue": len(service.queue)}, 200 if service.is_ready else 503)

    @app.get("/metrics", response_class=PlainTextResponse)
    def metrics() -> Response:
        """Figures for Prometheus."""
        return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    def model() -> dict[str, Any]:
        return {"id": service.start.model_name, "object": "model", "created": service.created, "owned_by": OWNER}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [model()]}

    @app.get("/v1/models/{name}")
    async def one_model(name: str) -> dict[str, Any]:
        if name != service.start.model_name:
            raise ApiError(404, "there is no such model here", param="model", code="model_not_found")
        return model()
