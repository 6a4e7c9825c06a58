"""Hooks: the handlers, and their part of the route table."""

from __future__ import annotations

from typing import Final

from aiohttp import web

from migrator.model import DomainName
from node_agent.api.requests import CLUSTER, domain_of, find_node, read_body, reply
from node_agent.api.route import Route
from node_agent.hooks.model import HookCall, HookList, HookSpec, HookTest, HookTestResult
from node_agent.pressure.policy import PressureAnswer, PressureReport
from node_agent.pressure.service import PressureService
from node_agent.trust.records import Role

_HOOK: Final = "/v1/hooks/{name}"
PRESSURE_SERVICE: Final = web.AppKey("pressure", PressureService)


async def add_hook(request: web.Request) -> web.StreamResponse:
    """201."""
    hook = await request.app[CLUSTER].hooks.add(await read_body(request, HookSpec))
    return reply(hook, status=201, location=f"/v1/hooks/{hook.name}")


async def list_hooks(request: web.Request) -> web.StreamResponse:
    """By name."""
    return reply(HookList(hooks=tuple(await request.app[CLUSTER].hooks.list_hooks())))


async def get_hook(request: web.Request) -> web.StreamResponse:
    """One."""
    return reply(await request.app[CLUSTER].hooks.get(domain_of(request)))


async def remove_hook(request: web.Request) -> web.StreamResponse:
    """204."""
    await request.app[CLUSTER].hooks.remove(domain_of(request))
    return web.Response(status=204)


async def test_hook(request: web.Request) -> web.StreamResponse:
    """When it was run."""
    cluster = request.app[CLUSTER]
    body = await read_body(request, HookTest)
    if body.node is not None:  # What it does for a node that there isn't may be a harm.
        await find_node(request, body.node)
    addresses: tuple[str, ...] = ()
    if body.domain is not None:
        spec = (await cluster.get_domain(DomainName(body.domain))).spec
        addresses = tuple(address for nic in spec.nics for address in nic.addresses)
    call = HookCall(
        point=body.point,
        node=body.node or cluster.node,
        domain=body.domain,
        destination=cluster.node,
        addresses=addresses,
        reason="a test",
    )
    return reply(HookTestResult(result=await cluster.hooks.test(domain_of(request), call)))


async def report_pressure(request: web.Request) -> web.StreamResponse:
    """200: what it came to."""
    report = await read_body(request, PressureReport)
    return reply(await request.app[PRESSURE_SERVICE].report(report))


ROUTES: Final = (
    Route(
        method="POST",
        path="/v1/hooks/pressure",
        handler=report_pressure,
        summary="Say that a domain or node is overloaded; a move is proposed, or made",
        body=PressureReport,
        result=PressureAnswer,
        errors=(404, 409),
    ),
    Route(
        method="POST",
        path="/v1/hooks",
        handler=add_hook,
        role=Role.ADMIN,
        summary="Add a hook",
        body=HookSpec,
        status=201,
        result=HookSpec,
        location=True,
        errors=(409,),
    ),
    Route(
        method="GET",
        path="/v1/hooks",
        handler=list_hooks,
        summary="All hooks; secrets are not shown",
        result=HookList,
    ),
    Route(
        method="GET",
        path=_HOOK,
        handler=get_hook,
        summary="One hook; its secret is not shown",
        result=HookSpec,
        errors=(404,),
    ),
    Route(
        method="DELETE",
        path=_HOOK,
        handler=remove_hook,
        role=Role.ADMIN,
        summary="Remove a hook",
        status=204,
        errors=(404,),
    ),
    Route(
        method="POST",
        path=f"{_HOOK}/test",
        handler=test_hook,
        summary="Really run a hook on this agent, as if the moment had come",
        body=HookTest,
        result=HookTestResult,
        errors=(404, 409),
    ),
)
