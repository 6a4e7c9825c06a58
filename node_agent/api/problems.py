"""Every error of the API is a problem document (RFC 9457), also those of the HTTP server itself."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from http import HTTPStatus
from typing import Final

import msgspec
from aiohttp import hdrs, web

from migrator.errors import FerryError, InvalidRequest, RefusedError, UnauthenticatedError
from node_agent.resources import Problem

log = logging.getLogger(__name__)

CONTENT_TYPE: Final = "application/problem+json"
_HTTP_CODES: Final[Mapping[int, str]] = {
    404: "not-found",
    405: "method-not-allowed",
    413: "body-too-large",
    415: "unsupported-media-type",
    503: "too-busy",
}

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def problem_of(error: FerryError, instance: str = "") -> Problem:
    """The document for an error of the tree. `status` is its `http_status`."""
    return Problem(
        type=f"urn:ferry:problem:{error.code}",
        title=_title(error.http_status),
        status=error.http_status,
        detail=str(error),
        code=error.code,
        instance=instance,
        fields=error.fields if isinstance(error, InvalidRequest) else {},
        reasons=error.reasons if isinstance(error, RefusedError) else (),
    )


def respond(problem: Problem, headers: Mapping[str, str] | None = None) -> web.Response:
    """The response that carries it."""
    return web.Response(
        status=problem.status,
        body=msgspec.json.encode(problem),
        content_type=CONTENT_TYPE,
        headers=headers,
    )


@web.middleware
async def problems(request: web.Request, handler: Handler) -> web.StreamResponse:
    """The outermost middleware: whatever is raised inside becomes a problem document."""
    try:
        return await handler(request)
    except FerryError as error:
        if error.http_status >= 500:
            log.warning("%s %s: %s", request.method, request.path, error)
        return respond(problem_of(error, request.rel_url.raw_path), _headers(error))
    except web.HTTPException as error:
        return _http_problem(request, error)
    except asyncio.CancelledError:
        raise
    except Exception:
        log.exception("%s %s failed", request.method, request.path)
        internal = FerryError("an error inside the agent; its log has the details")
        return respond(problem_of(internal, request.rel_url.raw_path))


def _headers(error: FerryError) -> Mapping[str, str] | None:
    asks = isinstance(error, UnauthenticatedError)
    return {hdrs.WWW_AUTHENTICATE: 'Bearer realm="ferry"'} if asks else None


def _http_problem(request: web.Request, error: web.HTTPException) -> web.Response:
    """For what the HTTP server refuses by itself."""
    headers: dict[str, str] = {}
    detail = error.text or error.reason
    if isinstance(error, web.HTTPNotFound):
        detail = f"there is nothing at {request.path}; see /openapi.json"
    elif isinstance(error, web.HTTPMethodNotAllowed):
        allowed = ", ".join(sorted(error.allowed_methods))
        detail = f"{request.method} is not possible at {request.path}, only {allowed}"
        headers["Allow"] = allowed
    elif isinstance(error, web.HTTPRequestEntityTooLarge):
        detail = f"the body is too large; at most {request.client_max_size} bytes are read"
    code = _HTTP_CODES.get(error.status, "http")
    problem = Problem(
        type=f"urn:ferry:problem:{code}",
        title=_title(error.status),
        status=error.status,
        detail=detail,
        code=code,
        instance=request.rel_url.raw_path,
    )
    return respond(problem, headers)


def _title(status: int) -> str:
    return HTTPStatus(status).phrase
