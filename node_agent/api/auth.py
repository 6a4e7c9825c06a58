"""Who asks, and whether they may: before any handler, by the one table of routes.

A caller over the unix socket is this host's root. Everybody else shows a bearer token, unless the
route is public. What isn't in the table is for admins only, but for the API's own description.
"""

from __future__ import annotations

import functools
import logging
import socket
from collections.abc import Mapping, Sequence
from typing import Any, Final

from aiohttp import hdrs, web
from aiohttp.typedefs import Handler, Middleware

from migrator.errors import FerryError, ForbiddenError, UnauthenticatedError
from node_agent.api.requests import CLUSTER
from node_agent.api.route import Route
from node_agent.peers.refusals import RefusalLog
from node_agent.trust.records import Role
from node_agent.trust.users import LOCAL, Caller, Users

log = logging.getLogger(__name__)

# Older versions of aiohttp know text alone as a key, newer ones warn of it.
_CALLER: Final[Any] = (
    web.RequestKey("caller", Caller) if hasattr(web, "RequestKey") else "ferry.caller"
)
_IDENTIFY: Final[Any] = (
    web.RequestKey("identify", object) if hasattr(web, "RequestKey") else "ferry.identify"
)
_PUBLIC_PATHS: Final = frozenset({"/openapi.json"})
_BEARER: Final = "bearer "


def caller_of(request: web.Request) -> Caller:
    """Who asks; in plain mode everybody is the local root."""
    caller = request.get(_CALLER)
    return caller if isinstance(caller, Caller) else LOCAL


def asker_of(request: web.Request) -> str:
    """Who asks, for those who read later what was done and ask whose wish it was."""
    if _is_local(request):
        return f"{LOCAL.name} on {request.app[CLUSTER].node}"
    caller = request.get(_CALLER)
    if isinstance(caller, Caller):
        return f"user {caller.name} ({caller.role}, {caller.how})"
    return f"somebody at {request.remote}"  # In plain mode nobody is asked who they are.


async def may_still(request: web.Request) -> bool:
    """Whether who began this request might begin it now: tokens end, and users lose their roles.

    True where nobody is asked who they are, and while the store can't tell.
    """
    identify = request.get(_IDENTIFY)
    if identify is None:
        return True
    try:
        await identify()
    except (UnauthenticatedError, ForbiddenError):
        return False
    except FerryError as error:
        log.debug("whether %s %s may go on isn't known: %s", request.method, request.path, error)
    return True


def authentication(users: Users, node: str, routes: Sequence[Route]) -> Middleware:
    """The middleware. Raises UnauthenticatedError and ForbiddenError that say what is needed."""
    by_name: Mapping[tuple[str, str], Route] = {
        (route.method, route.path): route for route in routes
    }
    refusals = RefusalLog(log, node)

    @web.middleware
    async def authenticate(request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.match_info.http_exception is not None:
            return await handler(request)  # 404 or 405; the routes are no secret.
        resource = request.match_info.route.resource
        path = resource.canonical if resource is not None else request.path
        route = by_name.get((request.method, path))
        public = path in _PUBLIC_PATHS or (route is not None and route.public)
        needed = route.needed_role if route is not None else Role.ADMIN
        identify = functools.partial(_identify, users, request, needed, public)
        request[_IDENTIFY] = identify
        try:
            caller = await identify()
        except (UnauthenticatedError, ForbiddenError) as error:
            refusals.note(request.remote or "somebody", f"{request.method} {path}: {error}")
            raise
        if caller is not None:
            request[_CALLER] = caller
            if request.method != hdrs.METH_GET:
                log.info("%s %s by %s (%s)", request.method, request.path, caller.name, caller.how)
        return await handler(request)

    return authenticate


async def _identify(
    users: Users, request: web.Request, needed: Role, public: bool
) -> Caller | None:
    if _is_local(request):
        return LOCAL
    if public:
        return None
    text = request.headers.get(hdrs.AUTHORIZATION, "")
    if not text:
        raise UnauthenticatedError(
            f"a bearer token of a user with the role {needed} is needed; `ferry user token` on a "
            "node makes one"
        )
    if not text.lower().startswith(_BEARER):
        raise UnauthenticatedError("the header Authorization must be: Bearer TOKEN")
    try:
        caller = await users.authenticate(text[len(_BEARER) :].strip())
    except UnauthenticatedError as error:
        raise UnauthenticatedError(f"{error}; a token of the role {needed} is needed") from error
    if not caller.role.allows(needed):
        raise ForbiddenError(
            f"the role {needed} is needed; user {caller.name} has the role {caller.role}"
        )
    return caller


def _is_local(request: web.Request) -> bool:
    transport = request.transport
    if transport is None:
        raise FerryError("the connection is gone")
    raw = transport.get_extra_info("socket")
    return raw is not None and raw.family == socket.AF_UNIX
