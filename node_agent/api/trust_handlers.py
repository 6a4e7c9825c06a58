"""The handlers for who belongs and who may: members, join tokens, users."""

from __future__ import annotations

import asyncio
from typing import Final

import msgspec
from aiohttp import hdrs, web

from migrator.errors import ConflictError, NotFoundError
from migrator.model import Name, NodeName
from node_agent.api.auth import caller_of
from node_agent.api.requests import CLUSTER, find_node, flag, read_body, reply
from node_agent.events import EventKind
from node_agent.host_shutdown import HostShutdown
from node_agent.metrics import CONTENT_TYPE, Seen, render
from node_agent.resources import GuestsShutdown, NodeRemoved
from node_agent.trust.records import (
    ApiTokenCreate,
    JoinRequest,
    JoinTokenCreate,
    UserChange,
    UserCreate,
    UserList,
    WhoAmI,
)
from node_agent.trust.removal import NodeRemoval
from node_agent.trust.service import Trust

TRUST: Final = web.AppKey("trust", Trust)
REMOVAL: Final = web.AppKey("removal", NodeRemoval)
HOST_SHUTDOWN: Final = web.AppKey("host-shutdown", HostShutdown)


def trust_of(request: web.Request) -> Trust:
    """ConflictError in plain mode."""
    trust = request.app.get(TRUST)
    if trust is None:
        raise ConflictError(
            'this node has tls.mode = "plain" in its configuration: there are no '
            "certificates, join tokens and users"
        )
    return trust


async def get_authority(request: web.Request) -> web.StreamResponse:
    """Public."""
    return reply(trust_of(request).authority_view())


async def get_cluster(request: web.Request) -> web.StreamResponse:
    """Its members."""
    return reply(trust_of(request).cluster_view())


async def create_join_token(request: web.Request) -> web.StreamResponse:
    """201; shown once."""
    body = await read_body(request, JoinTokenCreate, required=False)
    caller = caller_of(request)
    made = await trust_of(request).make_join_token(body.ttl_s, caller.name)
    return reply(made, status=201)


async def join_cluster(request: web.Request) -> web.StreamResponse:
    """The join token in the body is what lets it in."""
    body = await read_body(request, JoinRequest)
    return reply(await trust_of(request).join(body, request.remote or "unix socket"))


async def get_metrics(request: web.Request) -> web.StreamResponse:
    """For Prometheus."""
    cluster, trust = request.app[CLUSTER], request.app.get(TRUST)
    seen = Seen(
        health=await cluster.health(),
        nodes=await cluster.list_neighbours(),
        migrations=await cluster.list_own_migrations(),
        certificate_not_after_s=None if trust is None else trust.certificate.not_after_s,
        authority_not_after_s=None if trust is None else trust.authority_span.not_after_s,
    )
    body = await asyncio.to_thread(render, seen)
    return web.Response(body=body, headers={hdrs.CONTENT_TYPE: CONTENT_TYPE})


async def get_node(request: web.Request) -> web.StreamResponse:
    """One."""
    return reply(await find_node(request, _name(request, "node")))


async def remove_node(request: web.Request) -> web.StreamResponse:
    """Its certificates are refused from now on."""
    name = _name(request, "node")
    removal = request.app.get(REMOVAL)
    if removal is None:
        raise ConflictError("this agent can't remove nodes")
    domains = await removal.remove(NodeName(name), force=flag(request, "force"))
    request.app[CLUSTER].events.emit(
        EventKind.NODE_REMOVED, f"{caller_of(request).name} removed node {name}"
    )
    return reply(NodeRemoved(name=name, domains=tuple(domains)))


async def shut_guests_down(request: web.Request) -> web.StreamResponse:
    """When none is left, or the time is over. It is this node's own, or none."""
    name, body = _name(request, "node"), await read_body(request, GuestsShutdown)
    shutdown = request.app.get(HOST_SHUTDOWN)
    if shutdown is None or shutdown.node != name:
        raise ConflictError(f"only the agent of {name} itself shuts its guests down")
    return reply(await shutdown.run(body.timeout_s))


async def who_am_i(request: web.Request) -> web.StreamResponse:
    """The caller."""
    caller = caller_of(request)
    return reply(WhoAmI(name=caller.name, role=caller.role, how=caller.how))


async def list_users(request: web.Request) -> web.StreamResponse:
    """By name."""
    return reply(UserList(users=tuple(await trust_of(request).users.list_users())))


async def create_user(request: web.Request) -> web.StreamResponse:
    """201."""
    body = await read_body(request, UserCreate)
    user = await trust_of(request).users.create(body)
    _tell(request, f"added user {user.name} with the role {user.role}")
    return reply(user, status=201, location=f"/v1/users/{user.name}")


async def get_user(request: web.Request) -> web.StreamResponse:
    """One."""
    return reply(await trust_of(request).users.get(_name(request, "user")))


async def change_user(request: web.Request) -> web.StreamResponse:
    """The role; what the user's tokens may from the next request on."""
    name, body = _name(request, "user"), await read_body(request, UserChange)
    before, user = await trust_of(request).users.set_role(name, body.role)
    if before is not body.role:
        _tell(request, f"changed the role of user {name} from {before} to {body.role}")
    return reply(user)


async def delete_user(request: web.Request) -> web.StreamResponse:
    """204; its tokens too."""
    name = _name(request, "user")
    await trust_of(request).users.remove(name)
    _tell(request, f"removed user {name}")
    return web.Response(status=204)


async def create_api_token(request: web.Request) -> web.StreamResponse:
    """201; shown once."""
    name = _name(request, "user")
    body = await read_body(request, ApiTokenCreate, required=False)
    made = await trust_of(request).users.issue(name, body)
    _tell(request, f"made token {made.id} for user {name}")
    return reply(made, status=201)


async def delete_api_token(request: web.Request) -> web.StreamResponse:
    """204."""
    name, token_id = _name(request, "user"), request.match_info["id"]
    await trust_of(request).users.revoke(name, token_id)
    _tell(request, f"removed token {token_id} of user {name}")
    return web.Response(status=204)


def _tell(request: web.Request, what: str) -> None:
    request.app[CLUSTER].events.emit(EventKind.USER_CHANGED, f"{caller_of(request).name} {what}")


def _name(request: web.Request, noun: str) -> str:
    """NotFoundError for what can't be a name: then there is none of that name."""
    text = request.match_info["name"]
    try:
        return msgspec.convert(text, type=Name)
    except msgspec.ValidationError as error:
        raise NotFoundError(f"there is no {noun} {text}") from error
