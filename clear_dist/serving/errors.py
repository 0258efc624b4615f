"""Errors in the shape that OpenAI's clients know; nothing of this machine is in them."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
WRONG, BROKEN = "invalid_request_error", "server_error"
FLAG = re.compile(r"--([a-z][a-z-]*)")
FOLDERS = re.compile(r"(?<![\w.])(?:~|[A-Za-z]:)?/(?:[^\s/'\",;:()]+/)*([^\s/'\",;:()]*)")
"""A path, and its last part."""
PARAMETERS = {"num_images": "n", "height": "size", "width": "size", "res": "size", "output": "output_format"}
"""Ours for what flags call otherwise."""


class ApiError(Exception):
    """What is wrong with a request, to its client."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        kind = TYPES.get(self.status, WRONG if self.status < 500 else BROKEN)
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


CANCELLED = ApiError(409, "the job was cancelled", code="cancelled")
TOO_LONG = ApiError(422, "the pictures took longer than this server allows", code="timeout")


def refused(error: ValueError, *, status: int = 400) -> ApiError:
    """What the command line would have said, with parameters for flags, and without folders."""
    message = without_folders(str(error))
    flag = FLAG.search(message)
    name = flag[1].replace("-", "_") if flag is not None else None
    said = FLAG.sub(lambda found: _parameter(found[1].replace("-", "_")), message)
    return ApiError(status, said, param=None if name is None else _parameter(name))


def without_folders(text: str) -> str:
    return FOLDERS.sub(r"\1", text)


def of_validation(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    """The first thing that does not fit the schema; the value is not repeated, as it may be anything."""
    first = errors[0]
    where = [str(part) for part in first.get("loc", ()) if part not in ("body", "query", "path", "header")]
    param = ".".join(where) or None
    if first.get("type") == "extra_forbidden":
        return ApiError(400, f"unknown parameter: {param!r}", param=param, code="unknown_parameter")
    if first.get("type") == "missing" and param is not None:
        return ApiError(400, f"missing required parameter: {param!r}", param=param, code="missing_required_parameter")
    if first.get("type") == "json_invalid":
        return ApiError(400, "the body must be JSON", code="invalid_json")
    about = f"{param}: " if param else ""
    return ApiError(400, f"{about}{first.get('msg', 'it does not fit')}", param=param, code="invalid_value")


def _parameter(name: str) -> str:
    return PARAMETERS.get(name, name)
