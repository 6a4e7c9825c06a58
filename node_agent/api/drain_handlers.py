"""The handlers of cordons and drains."""

from __future__ import annotations

from typing import Final

from aiohttp import web

from node_agent.api.auth import asker_of
from node_agent.api.requests import drain_of, find_node, flag, node_of, read_body, reply
from node_agent.drain.resources import (
    CancelMode,
    CordonRequest,
    DrainList,
    DrainRequest,
    UndrainRequest,
)
from node_agent.drain.service import DrainService

DRAIN_SERVICE: Final = web.AppKey("drains", DrainService)


async def cordon_node(request: web.Request) -> web.StreamResponse:
    """The node, which takes nothing any more."""
    node = node_of(request)
    body = await read_body(request, CordonRequest, required=False)
    cordons = request.app[DRAIN_SERVICE].cordons
    await cordons.cordon(node, asker_of(request), body.reason)
    return reply(await find_node(request, node))


async def uncordon_node(request: web.Request) -> web.StreamResponse:
    """The node, which takes domains again."""
    node = node_of(request)
    await request.app[DRAIN_SERVICE].cordons.uncordon(node, asker_of(request))
    return reply(await find_node(request, node))


async def drain_node(request: web.Request) -> web.StreamResponse:
    """202 and where to look; with `dry_run` 200: the plan, and what stands in its way."""
    node, dry_run = node_of(request), flag(request, "dry_run")
    body = await read_body(request, DrainRequest, required=False)
    service = request.app[DRAIN_SERVICE]
    if dry_run:
        return reply(await service.plan(node, body))
    drain = await service.drain(node, body, asker_of(request))
    return reply(drain, status=202, location=f"/v1/drains/{drain.id}")


async def cancel_node_drain(request: web.Request) -> web.StreamResponse:
    """202: no further move begins."""
    service = request.app[DRAIN_SERVICE]
    drain = await service.cancel_of(node_of(request), _mode(request), asker_of(request))
    return reply(drain, status=202, location=f"/v1/drains/{drain.id}")


async def undrain_node(request: web.Request) -> web.StreamResponse:
    """202 and where to look; with `dry_run` 200: what would come back."""
    node, dry_run = node_of(request), flag(request, "dry_run")
    body = await read_body(request, UndrainRequest, required=False)
    service = request.app[DRAIN_SERVICE]
    if dry_run:
        return reply(await service.plan_undrain(node))
    drain = await service.undrain(node, body, asker_of(request))
    return reply(drain, status=202, location=f"/v1/drains/{drain.id}")


async def list_drains(request: web.Request) -> web.StreamResponse:
    """Newest first."""
    return reply(DrainList(drains=tuple(await request.app[DRAIN_SERVICE].list_drains())))


async def get_drain(request: web.Request) -> web.StreamResponse:
    """One."""
    return reply(await request.app[DRAIN_SERVICE].get(drain_of(request)))


async def cancel_drain(request: web.Request) -> web.StreamResponse:
    """202: no further move begins."""
    service = request.app[DRAIN_SERVICE]
    drain = await service.cancel(drain_of(request), _mode(request), asker_of(request))
    return reply(drain, status=202, location=f"/v1/drains/{drain.id}")


async def balance_nodes(request: web.Request) -> web.StreamResponse:
    """202 and where to look; with `dry_run` 200: the moves, and what they gain."""
    service = request.app[DRAIN_SERVICE]
    if flag(request, "dry_run"):
        return reply(await service.plan_balance())
    drain = await service.balance()
    return reply(drain, status=202, location=f"/v1/drains/{drain.id}")


def _mode(request: web.Request) -> CancelMode:
    return CancelMode.ABORT if flag(request, "abort_moves") else CancelMode.LET_END
