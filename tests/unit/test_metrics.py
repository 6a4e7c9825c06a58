"""What Prometheus gets, read by its own parser."""

from __future__ import annotations

import time
from pathlib import Path

import msgspec
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer
from prometheus_client.parser import text_string_to_metric_families

from migrator.model import (
    DomainName,
    Migration,
    MigrationProgress,
    MigrationRequest,
    MigrationState,
    NodeName,
)
from node_agent.api.server import create_app
from node_agent.metrics import Seen, render
from node_agent.resources import Health
from tests.unit.agent_world import open_world, spec_of


def samples(text: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def migration(number: int, source: str, blackout_ms: float | None) -> Migration:
    state = MigrationState.PRECOPY if blackout_ms is None else MigrationState.COMPLETED
    return Migration(
        id=f"m-{number}",
        domain="web",
        source=source,
        destination="z",
        request=MigrationRequest(destination="z"),
        state=state,
        progress=MigrationProgress(state=state, iteration=1),
        created_at_s=time.time(),
        blackout_ms=blackout_ms,
        total_s=None if blackout_ms is None else 3.0,
    )


async def test_an_agent_tells_of_its_node_and_of_the_others(tmp_path: Path) -> None:
    async with open_world(tmp_path) as world:
        await world.a.cluster.define(spec_of())
        await world.a.cluster.start(DomainName("web"), NodeName("a"))
        for number, (source, ms) in enumerate([("a", 8.0), ("a", 25.0), ("a", None), ("b", 9.0)]):
            world.migrations[f"m-{number}"] = migration(number, source, ms)
        app: web.Application = create_app(world.a.cluster)
        async with TestClient(TestServer(app)) as client, client.get("/metrics") as response:
            assert response.status == 200
            assert response.headers["Content-Type"].startswith("text/plain; version=0.0.4")
            found = samples(await response.text())
    assert found["ferry_node_state", (("node", "b"), ("state", "ready"))] == 1
    assert found["ferry_node_state", (("node", "b"), ("state", "unreachable"))] == 0
    assert found["ferry_domains", ()] == 1
    assert found["ferry_memory_committed_bytes", ()] == 64 * 1024**2
    assert found["ferry_migrations", (("state", "completed"),)] == 2  # b tells of its own.
    assert found["ferry_migrations", (("state", "precopy"),)] == 1
    blackouts = "ferry_migration_blackout_seconds"
    assert found[f"{blackouts}_bucket", (("le", "0.005"),)] == 0
    assert found[f"{blackouts}_bucket", (("le", "0.01"),)] == 1
    assert found[f"{blackouts}_bucket", (("le", "+Inf"),)] == 2
    assert found[f"{blackouts}_count", ()] == 2
    assert abs(found[f"{blackouts}_sum", ()] - 0.033) < 1e-9
    assert found["ferry_migration_total_seconds_sum", ()] == 6
    assert not any(name.startswith("ferry_certificate") for name, _ in found)


def test_the_certificates_end_is_told_where_there_is_one() -> None:
    health = Health(node="n1", status="ok", agent_version="1", loop_blocked_ms_max=12.0)
    seen = Seen(health=health, nodes=(), migrations=(), certificate_not_after_s=1.5e9)
    found = samples(render(seen).decode())
    assert found["ferry_certificate_expires_timestamp_seconds", ()] == 1.5e9
    assert found["ferry_event_loop_blocked_seconds_max", ()] == 0.012
    moved = samples(render(msgspec.structs.replace(seen, certificate_not_after_s=None)).decode())
    assert ("ferry_certificate_expires_timestamp_seconds", ()) not in moved
