"""Errors as problem+json (RFC 9457): one place says which exception becomes which answer."""

import json
import logging
from collections.abc import Mapping
from typing import Any, Final

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.routing import Route

from ..errors import (
    BlipBatchError,
    JobConflict,
    JobError,
    RedisUnavailable,
    StorageError,
    StoreUnavailable,
    UnknownJob,
    UsageError,
)  # fmt: skip
from .models import Problem

MEDIA_TYPE: Final = "application/problem+json"
RETRY_AFTER: Final = "5"  # seconds

#: code -> status, title
_PROBLEMS: Final[Mapping[str, tuple[int, str]]] = {
    "malformed": (400, "The body is not JSON"),
    "unauthorized": (401, "A token is needed"),
    "forbidden": (403, "Not from a web page"),
    "not_found": (404, "No such path"),
    "unknown_job": (404, "No such job"),
    "method_not_allowed": (405, "The path has no such method"),
    "conflict": (409, "The job or its output does not allow it"),
    "part_unreadable": (409, "The job's files are not as they should be"),
    "too_large": (413, "The body is too large"),
    "invalid": (422, "The request cannot be right"),
    "storage_failed": (422, "The place cannot be read or written"),
    "internal": (500, "A bug"),
    "unhealthy": (503, "The control loop does not work"),
    "redis_unavailable": (503, "Redis does not answer"),
    "storage_unavailable": (503, "The object store does not answer"),
}
#: Searched in order: subclasses before their bases.
_CODES: Final[tuple[tuple[type[BlipBatchError], str], ...]] = (
    (UnknownJob, "unknown_job"), (JobConflict, "conflict"), (UsageError, "invalid"), (JobError, "part_unreadable"),
    (RedisUnavailable, "redis_unavailable"), (StoreUnavailable, "storage_unavailable"),
    (StorageError, "storage_failed"),
)  # fmt: skip
_OF_STATUS: Final = {400: "malformed", 404: "not_found", 405: "method_not_allowed", 413: "too_large"}
#: What each route may answer besides its own; for the OpenAPI document.
RESPONSES: Final[dict[int | str, dict[str, Any]]] = {
    status: {"description": text, "content": {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}}}
    for status, text in {
        400: "the body is not JSON", 401: "no token, or a wrong one",
        404: "no such job", 409: "the job or its output does not allow it",
        413: "the body is too large", 422: "the request cannot be right",
        503: "it cannot answer now: Redis, the object store or the control loop does not",
    }.items()
}  # fmt: skip

log = logging.getLogger(__name__)


def problem(code: str, detail: str, headers: Mapping[str, str] | None = None) -> Response:
    """The answer for a code of `_PROBLEMS`; `detail` becomes one line."""
    status, title = _PROBLEMS[code]
    line = " ".join(detail.split())
    body = Problem(type=f"urn:blip-batch:problem:{code}", title=title, status=status, code=code, detail=line)
    # Escapes, for what a client sent may hold lone surrogates, which UTF-8 cannot.
    data = json.dumps(body.model_dump()).encode()
    more = {"Retry-After": RETRY_AFTER} if status == 503 else {}
    return Response(data, status, headers={**more, **(headers or {})}, media_type=MEDIA_TYPE)


def responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: RESPONSES[status] for status in (401, *statuses, 503)}


def install(app: FastAPI) -> None:
    """Makes every error of the app a problem."""
    app.add_exception_handler(BlipBatchError, _expected)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _refused)
    app.add_exception_handler(Exception, _bug)


def _expected(_: Request, error: Exception) -> Response:
    code = next((code for kind, code in _CODES if isinstance(error, kind)), "internal")
    return problem(code, str(error))


def _invalid(_: Request, error: Exception) -> Response:
    """The first mistake, worded as `jobs.make_spec` words its own."""
    if not isinstance(error, RequestValidationError):
        raise error
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return problem("malformed", f"the body is not JSON: {first['ctx']['error']}")
    if first["type"] == "model_attributes_type":
        return problem("invalid", "the body is no JSON object; send one, with Content-Type: application/json")
    place = ".".join(str(part) for part in first["loc"][1:]) or str(first["loc"][0])
    given = "" if first["type"] == "missing" else f"={repr(first['input'])[:200]}"
    return problem("invalid", f"{place}{given}: {first['msg']}")


def _refused(request: Request, error: Exception) -> Response:
    """What the framework refuses by itself: no such path or method, a body that cannot be read."""
    if not isinstance(error, HTTPException):
        raise error
    headers = dict(error.headers or {})
    if error.status_code == 405:  # the framework names the methods of one of the path's routes
        headers["Allow"] = ", ".join(sorted(_methods_at(request.app, request.url.path)))
    return problem(_OF_STATUS.get(error.status_code, "invalid"), str(error.detail), headers)


def _methods_at(app: FastAPI, path: str) -> set[str]:
    here = [route for route in app.routes if isinstance(route, Route) and route.path_regex.match(path)]
    return {method for route in here for method in route.methods or ()}


def _bug(request: Request, error: Exception) -> Response:
    log.error("%s %s", request.method, request.url.path, exc_info=error)
    return problem("internal", "the orchestrator's log has more")
