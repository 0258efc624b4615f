"""What stands before all routes: who may ask, from where, and how much they may send. Plain ASGI."""

import asyncio
import hmac
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from fastapi.responses import JSONResponse

from clear_dist.request.serve import LOOPBACK
from clear_dist.serving.errors import ApiError

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
OPEN = ("/", "/health", "/page/", "/v1/results/")
"""Paths, or their beginnings, that need no key: results have names that nobody guesses."""
SECONDS_TO_SEND = 60.0
"""For a whole body, whatever its client's line."""


def answer(error: ApiError) -> JSONResponse:
    return JSONResponse(error.body(), status_code=error.status, headers=error.headers)


class Guard:
    """Refuses requests before anything of them is read."""

    def __init__(self, app: Any, *, key: str | None, most_bytes: int, on_answer: Callable[[int], None]) -> None:
        """Without a key only this machine's own names are answered: a foreign page must not reach us by another."""
        self._app = app
        self._key = None if key is None else key.encode()
        self._most_bytes, self._on_answer = most_bytes, on_answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        send = self._counted(send)
        headers = {name.lower(): value for name, value in scope["headers"]}
        error = self._refusal(scope["path"], headers)
        if error is not None:
            return await answer(error)(scope, receive, send)  # type: ignore[arg-type]
        try:
            await self._app(scope, self._bounded(receive), send)
        except ApiError as late:  # while the body came; nothing has been answered
            await answer(late)(scope, receive, send)  # type: ignore[arg-type]

    def _counted(self, send: Send) -> Send:
        async def counted(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                self._on_answer(message["status"])
            await send(message)

        return counted

    def _refusal(self, path: str, headers: dict[bytes, bytes]) -> ApiError | None:
        if self._key is None and not _is_here(headers.get(b"host", b"")):
            return ApiError(403, "this server answers to this machine's own names only", code="wrong_host")
        origin = headers.get(b"origin", b"")
        if self._key is None and origin and not _is_here(origin.partition(b"://")[2]):
            return ApiError(403, "pages of other sites may not ask this server", code="wrong_origin")
        if self._key is not None and not _is_open(path):
            scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
            if scheme.lower() != b"bearer" or not hmac.compare_digest(given.strip(), self._key):
                challenge = {"WWW-Authenticate": "Bearer"}
                return ApiError(401, "a valid API key is needed", code="invalid_api_key", headers=challenge)
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length[:18]) > self._most_bytes:
            return self._too_large()
        return None

    def _bounded(self, receive: Receive) -> Receive:
        taken, is_whole = 0, False

        async def bounded() -> MutableMapping[str, Any]:
            nonlocal taken, is_whole
            if is_whole:  # nothing but its client's end can come
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), SECONDS_TO_SEND)
            except TimeoutError:
                raise ApiError(408, "the body did not come in time", code="timeout") from None
            taken += len(message.get("body", b""))
            is_whole = not message.get("more_body", False)
            if taken > self._most_bytes:
                raise self._too_large()
            return message

        return bounded

    def _too_large(self) -> ApiError:
        return ApiError(413, f"a request must be at most {self._most_bytes // 10**6} MB", code="too_large")


def _is_here(host: bytes) -> bool:
    """Whether a host, with or without its port, is one of this machine's own names."""
    name = host.decode("latin-1").lower()
    name = name[1:].partition("]")[0] if name.startswith("[") else name.partition(":")[0]
    return name in LOOPBACK


def _is_open(path: str) -> bool:
    return path in OPEN[:2] or path.startswith(OPEN[2:])
