"""What the handlers read from a request and answer with, typed."""

from __future__ import annotations

import difflib
from collections.abc import Collection
from typing import Any, Final, TypeVar

import msgspec
from aiohttp import hdrs, web

from migrator.errors import InvalidRequest, NotFoundError
from migrator.figures import SAMPLE_S_MAX, SAMPLE_S_MIN
from migrator.model import DomainName, FileName, Name, NodeName, PoolName, VolumeName
from node_agent.api.validation import decode_body
from node_agent.cluster import ClusterService
from node_agent.resources import Node

T = TypeVar("T")

CLUSTER: Final = web.AppKey("cluster", ClusterService)
BODY_CAP_BYTES: Final = 256 * 1024


async def read_body(request: web.Request, kind: type[T], *, required: bool = True) -> T:
    """The JSON body. InvalidRequest names the wrong field; 413 and 415 as HTTP says.

    An empty body counts as `{}` where it isn't required. Only JSON is read: a browser can't be
    made to send it to another site without asking that site first.
    """
    data = await request.read()
    if not data and not required:
        data = b"{}"
    elif hdrs.CONTENT_TYPE in request.headers and request.content_type != "application/json":
        raise web.HTTPUnsupportedMediaType(
            text=f"the body must be application/json, not {request.content_type}"
        )
    return decode_body(data, kind)


def reply(value: object, *, status: int = 200, location: str | None = None) -> web.Response:
    """A JSON response."""
    return web.Response(
        status=status,
        body=msgspec.json.encode(value),
        content_type="application/json",
        headers={hdrs.LOCATION: location} if location else None,
    )


def domain_of(request: web.Request) -> DomainName:
    """NotFoundError for what can't be a domain's name: then there is none of that name."""
    return DomainName(_parameter(request, "name", Name, "domain"))


def pool_of(request: web.Request) -> PoolName:
    """As `domain_of`."""
    return PoolName(_parameter(request, "pool", Name, "pool"))


def volume_of(request: web.Request) -> VolumeName:
    """As `domain_of`."""
    return VolumeName(_parameter(request, "volume", FileName, "volume"))


def migration_of(request: web.Request) -> str:
    """As `domain_of`."""
    return _parameter(request, "id", FileName, "migration")


def drain_of(request: web.Request) -> str:
    """As `domain_of`."""
    return _parameter(request, "id", FileName, "drain")


def node_of(request: web.Request) -> NodeName:
    """As `domain_of`."""
    return NodeName(_parameter(request, "node", Name, "node"))


async def find_node(request: web.Request, name: str) -> Node:
    """The node of that name. NotFoundError says which there are."""
    nodes = {node.name: node for node in await request.app[CLUSTER].list_nodes()}
    if name not in nodes:
        raise NotFoundError(f"there is no node {name}; known: {', '.join(nodes) or 'none'}")
    return nodes[name]


def number(
    request: web.Request, name: str, default: int | None, *, at_least: int = 0, at_most: int = 2**53
) -> int | None:
    """A whole number behind the `?`; out of bounds or no number: InvalidRequest."""
    text = request.query.get(name)
    if text is None:
        return default
    right = f"a whole number from {at_least} to {at_most}"
    value = int(text) if text.isascii() and text.isdigit() and len(text) < 20 else -1
    if not at_least <= value <= at_most:
        raise invalid_query(name, right)
    return value


def seconds_of(request: web.Request, name: str, default: float) -> float:
    """For how long a dirty log is sampled; out of bounds or no number: InvalidRequest."""
    text = request.query.get(name)
    if text is None:
        return default
    try:
        value = float(text) if len(text) < 20 else -1.0
    except ValueError:
        value = -1.0
    if not SAMPLE_S_MIN <= value <= SAMPLE_S_MAX:
        raise invalid_query(name, f"seconds, from {SAMPLE_S_MIN:g} to {SAMPLE_S_MAX:g}")
    return value


def flag(request: web.Request, name: str) -> bool:
    """`?name=true`; also `1`, and `?name` alone."""
    text = request.query.get(name)
    if text in {None, "false", "0"}:
        return False
    if text in {"true", "1", ""}:
        return True
    raise invalid_query(name, "true or false")


def invalid_query(name: str, right: str) -> InvalidRequest:
    """The InvalidRequest for a parameter behind the `?`."""
    return InvalidRequest(f"the parameter {name} must be {right}", {name: right})


def check_query(request: web.Request, known: Collection[str]) -> None:
    """InvalidRequest for a parameter that the route doesn't have.

    A mistyped `dry_run` must not begin the real thing.
    """
    for name in request.query:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            others = f" (known: {', '.join(known)})" if known else ""
            hint = f"did you mean {close[0]}?" if close else f"it is unknown{others}"
            raise invalid_query(name, f"left out; {hint}")


def _parameter(request: web.Request, name: str, kind: Any, noun: str) -> str:
    text = request.match_info[name]
    try:
        msgspec.convert(text, type=kind)
    except msgspec.ValidationError as error:
        raise NotFoundError(f"there is no {noun} {text}") from error
    return text
