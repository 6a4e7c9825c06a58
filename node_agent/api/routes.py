"""The one table of routes: the server serves it and `/openapi.json` documents it."""

from __future__ import annotations

from typing import Final

from migrator.figures import DirtyRate, SampleSeconds
from migrator.model import DomainDefinition, Migration
from node_agent.api import handlers, hooks, storage, streams
from node_agent.api.drain_routes import DRAIN_ROUTES
from node_agent.api.route import Query, Route
from node_agent.api.trust_routes import TRUST_ROUTES
from node_agent.events import EventList
from node_agent.resources import (
    Domain,
    DomainList,
    DryRun,
    Health,
    MigrationChange,
    MigrationCreate,
    MigrationList,
    NodeList,
    StartRequest,
    StopRequest,
    TakeoverRequest,
)

_DOMAIN: Final = "/v1/domains/{name}"

_DOMAINS: Final = (
    Route(
        method="POST",
        path="/v1/domains",
        handler=handlers.define_domain,
        summary="Define a domain",
        body=DomainDefinition,
        status=201,
        result=Domain,
        location=True,
        errors=(409,),
    ),
    Route(
        method="GET",
        path="/v1/domains",
        handler=handlers.list_domains,
        summary="All domains of the cluster",
        result=DomainList,
    ),
    Route(
        method="GET",
        path=_DOMAIN,
        handler=handlers.get_domain,
        summary="One domain",
        result=Domain,
        errors=(404,),
    ),
    Route(
        method="DELETE",
        path=_DOMAIN,
        handler=handlers.delete_domain,
        summary="Delete the definition of a stopped domain; its volumes stay",
        status=204,
        errors=(404, 409),
    ),
    Route(
        method="POST",
        path=f"{_DOMAIN}/start",
        handler=handlers.start_domain,
        summary="Start a domain; answers when it runs",
        body=StartRequest,
        body_required=False,
        result=Domain,
        errors=(404, 409),
    ),
    Route(
        method="POST",
        path=f"{_DOMAIN}/takeover",
        handler=handlers.take_domain_over,
        summary="Start a domain from disk whose node is silent, behind a confirmed fence",
        body=TakeoverRequest,
        result=Domain,
        errors=(404, 409),
    ),
    Route(
        method="POST",
        path=f"{_DOMAIN}/stop",
        handler=handlers.stop_domain,
        summary="Power a domain off; answers when it is gone",
        body=StopRequest,
        body_required=False,
        result=Domain,
        errors=(404, 409),
    ),
    Route(
        method="POST",
        path=f"{_DOMAIN}/pause",
        handler=handlers.pause_domain,
        summary="Stop a domain's vCPUs",
        result=Domain,
        errors=(404, 409),
    ),
    Route(
        method="POST",
        path=f"{_DOMAIN}/resume",
        handler=handlers.resume_domain,
        summary="Run a paused domain's vCPUs",
        result=Domain,
        errors=(404, 409),
    ),
    Route(
        method="POST",
        path=f"{_DOMAIN}/reset",
        handler=handlers.reset_domain,
        summary="Reset a domain as its reset button would",
        result=Domain,
        errors=(404, 409),
    ),
    Route(
        method="GET",
        path=f"{_DOMAIN}/console",
        handler=streams.read_console,
        summary="What a domain's serial console printed on the node that owns it",
        streams=("text/plain",),
        query=(
            Query(name="offset", kind=int, description="Begin here; by default near the end"),
            Query(name="limit_bytes", kind=int, description="At most this much: 1 to 65536"),
            Query(name="follow", kind=bool, description="Go on with what is printed later"),
        ),
        errors=(404,),
    ),
    Route(
        method="GET",
        path=f"{_DOMAIN}/dirty-rate",
        handler=handlers.get_dirty_rate,
        summary="How fast a running domain dirties its memory; answers when it was sampled",
        result=DirtyRate,
        query=(
            Query(
                name="seconds", kind=SampleSeconds, description="How long to sample; by default 1"
            ),
        ),
        errors=(404, 409),
    ),
)

_MIGRATIONS: Final = (
    Route(
        method="POST",
        path=f"{_DOMAIN}/migrations",
        handler=handlers.migrate_domain,
        summary="Migrate a running domain; answers when the migration has begun",
        body=MigrationCreate,
        body_required=False,
        status=202,
        result=Migration,
        also={200: DryRun},
        location=True,
        query=(
            Query(
                name="dry_run",
                kind=bool,
                description="Only say (200) what it would be refused for, and how it would go",
            ),
            Query(
                name="sample_seconds",
                kind=SampleSeconds,
                description="How long a dry run samples the dirty log; by default 1",
            ),
        ),
        errors=(404, 409),
    ),
    Route(
        method="GET",
        path="/v1/migrations",
        handler=handlers.list_migrations,
        summary="All migrations, newest first",
        result=MigrationList,
    ),
    Route(
        method="GET",
        path="/v1/migrations/{id}",
        handler=handlers.get_migration,
        summary="One migration, with its progress",
        result=Migration,
        errors=(404,),
    ),
    Route(
        method="PATCH",
        path="/v1/migrations/{id}",
        handler=handlers.limit_migration,
        summary="Change the bandwidth cap of a migration that runs",
        body=MigrationChange,
        result=Migration,
        errors=(404, 409),
    ),
    Route(
        method="DELETE",
        path="/v1/migrations/{id}",
        handler=handlers.cancel_migration,
        summary="Cancel a migration; refused from the handoff on",
        status=202,
        result=Migration,
        location=True,
        errors=(404, 409),
    ),
)

_REST: Final = (
    Route(
        method="GET",
        path="/v1/events",
        handler=streams.read_events,
        summary="The event log: as it is written (SSE), or so far (Accept: application/json)",
        result=EventList,
        streams=(streams.EVENT_STREAM,),
        query=(
            Query(name="after", kind=int, description="Only events with a larger seq"),
            Query(name="limit", kind=int, description="JSON: the newest so many, 1 to 10000"),
        ),
        headers=("Last-Event-ID",),
    ),
    Route(
        method="GET",
        path="/v1/nodes",
        handler=handlers.list_nodes,
        summary="All nodes, with what runs on them",
        result=NodeList,
    ),
    Route(
        method="GET",
        path="/healthz",
        handler=handlers.get_health,
        summary="Whether this agent serves and its store answers",
        result=Health,
        errors=(503,),
        public=True,
    ),
)

ROUTES: Final = (
    *_DOMAINS,
    *_MIGRATIONS,
    *DRAIN_ROUTES,
    *hooks.ROUTES,
    *storage.ROUTES,
    *_REST,
    *TRUST_ROUTES,
)
