"""The handlers: read the request, call the cluster, answer. Errors go to `problems`."""

from __future__ import annotations

from typing import Final

from aiohttp import web

from migrator.model import DomainDefinition, NodeName
from node_agent.api.auth import asker_of, caller_of
from node_agent.api.requests import (
    CLUSTER,
    domain_of,
    flag,
    migration_of,
    read_body,
    reply,
    seconds_of,
)
from node_agent.resources import (
    DomainList,
    MigrationChange,
    MigrationCreate,
    MigrationList,
    NodeList,
    StartRequest,
    StopRequest,
    TakeoverRequest,
)

DEFAULT_SAMPLE_S: Final = 1.0


async def define_domain(request: web.Request) -> web.StreamResponse:
    """201 and where it is."""
    domain = await request.app[CLUSTER].define(await read_body(request, DomainDefinition))
    return reply(domain, status=201, location=f"/v1/domains/{domain.name}")


async def list_domains(request: web.Request) -> web.StreamResponse:
    """By name."""
    return reply(DomainList(domains=tuple(await request.app[CLUSTER].list_domains())))


async def get_domain(request: web.Request) -> web.StreamResponse:
    """One."""
    return reply(await request.app[CLUSTER].get_domain(domain_of(request)))


async def delete_domain(request: web.Request) -> web.StreamResponse:
    """204."""
    await request.app[CLUSTER].delete(domain_of(request))
    return web.Response(status=204)


async def start_domain(request: web.Request) -> web.StreamResponse:
    """When it runs."""
    domain = domain_of(request)
    body = await read_body(request, StartRequest, required=False)
    node = None if body.node is None else NodeName(body.node)
    return reply(await request.app[CLUSTER].start(domain, node))


async def take_domain_over(request: web.Request) -> web.StreamResponse:
    """When it runs."""
    domain = domain_of(request)
    body = await read_body(request, TakeoverRequest)
    off = None if body.powered_off is None else NodeName(body.powered_off)
    user = caller_of(request).name
    return reply(await request.app[CLUSTER].take_over(domain, NodeName(body.node), off, user))


async def stop_domain(request: web.Request) -> web.StreamResponse:
    """When it is gone."""
    domain = domain_of(request)
    body = await read_body(request, StopRequest, required=False)
    return reply(await request.app[CLUSTER].stop(domain, body.timeout_s, in_post_copy=True))


async def pause_domain(request: web.Request) -> web.StreamResponse:
    """When its vCPUs stand."""
    return reply(await request.app[CLUSTER].pause(domain_of(request)))


async def resume_domain(request: web.Request) -> web.StreamResponse:
    """When its vCPUs run."""
    return reply(await request.app[CLUSTER].resume(domain_of(request)))


async def reset_domain(request: web.Request) -> web.StreamResponse:
    """When it was reset."""
    return reply(await request.app[CLUSTER].reset(domain_of(request)))


async def get_dirty_rate(request: web.Request) -> web.StreamResponse:
    """When it has been sampled."""
    seconds = seconds_of(request, "seconds", DEFAULT_SAMPLE_S)
    return reply(await request.app[CLUSTER].dirty_rate(domain_of(request), seconds))


async def migrate_domain(request: web.Request) -> web.StreamResponse:
    """202 and where to look; with `dry_run` 200, the reasons against it, and a prediction."""
    domain = domain_of(request)
    dry_run = flag(request, "dry_run")
    sample_seconds = seconds_of(request, "sample_seconds", DEFAULT_SAMPLE_S)
    body = await read_body(request, MigrationCreate, required=False)
    if dry_run:
        return reply(await request.app[CLUSTER].check_migration(domain, body, sample_seconds))
    migration = await request.app[CLUSTER].migrate(domain, body)
    return reply(migration, status=202, location=f"/v1/migrations/{migration.id}")


async def list_migrations(request: web.Request) -> web.StreamResponse:
    """Newest first."""
    migrations = await request.app[CLUSTER].list_migrations()
    return reply(MigrationList(migrations=tuple(migrations)))


async def get_migration(request: web.Request) -> web.StreamResponse:
    """As its source sees it."""
    return reply(await request.app[CLUSTER].get_migration(migration_of(request)))


async def limit_migration(request: web.Request) -> web.StreamResponse:
    """The bandwidth, while it runs."""
    change = await read_body(request, MigrationChange)
    migration = await request.app[CLUSTER].limit_migration(
        migration_of(request), change.bandwidth_bytes_per_s
    )
    return reply(migration)


async def cancel_migration(request: web.Request) -> web.StreamResponse:
    """202: it is being cancelled."""
    cluster = request.app[CLUSTER]
    migration = await cluster.cancel_migration(migration_of(request), asker_of(request))
    return reply(migration, status=202, location=f"/v1/migrations/{migration.id}")


async def list_nodes(request: web.Request) -> web.StreamResponse:
    """By name."""
    return reply(NodeList(nodes=tuple(await request.app[CLUSTER].list_nodes())))


async def get_health(request: web.Request) -> web.StreamResponse:
    """200 while the agent serves and its store answers; 503 otherwise."""
    return reply(await request.app[CLUSTER].health())
