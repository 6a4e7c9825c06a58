"""The HTTP API, as it is used: the routes of the table, on two simulated nodes."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path
from typing import Any

import pytest

from migrator.errors import StoreError
from migrator.model import DomainName, DomainState, MigrationState
from node_agent.api.streams import STREAMS
from node_agent.events import AWAY, EventKind
from node_agent.nodes import NodeView
from tests.unit.agent_world import MAC, World, spec_of
from tests.unit.api_client import SPEC, Client, ask, running

# --- domains -------------------------------------------------------------------------------------


@pytest.mark.parametrize("node", ["a", "b"])
async def test_a_domains_life_wherever_it_runs(client: Client, node: str) -> None:
    async with client.post("/v1/domains", json=SPEC) as response:
        assert response.status == 201
        assert response.headers["Location"] == "/v1/domains/web"
        assert (await response.json())["state"] == "stopped"
    started = await ask(client, "POST", "/v1/domains/web/start", {"node": node}, status=200)
    assert (started["state"], started["node"], started["token"]) == ("running", node, 1)
    for operation, state in (("pause", "paused"), ("resume", "running"), ("reset", "running")):
        done = await ask(client, "POST", f"/v1/domains/web/{operation}", status=200)
        assert done["state"] == state
    listed = await ask(client, "GET", "/v1/domains", status=200)
    assert [(each["name"], each["node"]) for each in listed["domains"]] == [("web", node)]
    nodes = await ask(client, "GET", "/v1/nodes", status=200)
    assert {each["name"]: each["domains"] for each in nodes["nodes"]}[node] == ["web"]
    await ask(client, "DELETE", "/v1/domains/web", status=409)
    stopped = await ask(client, "POST", "/v1/domains/web/stop", status=200)
    assert (stopped["state"], stopped["node"]) == ("stopped", node)
    again = await ask(client, "POST", "/v1/domains/web/start", status=200)
    assert (again["node"], again["token"]) == (node, 2)
    await ask(client, "POST", "/v1/domains/web/stop", {"timeout_s": 1}, status=200)
    await ask(client, "DELETE", "/v1/domains/web", status=204)
    await ask(client, "GET", "/v1/domains/web", status=404)


async def test_conflicts_say_what_is_in_the_way(client: Client) -> None:
    await running(client, "b")
    problem = await ask(client, "POST", "/v1/domains/web/start", {"node": "a"}, status=409)
    assert "runs on b" in problem["detail"]
    problem = await ask(client, "POST", "/v1/domains/web/start", status=409)
    assert "already" in problem["detail"]
    problem = await ask(client, "POST", "/v1/domains", SPEC | {"name": "x"}, status=409)
    assert MAC in problem["detail"]
    await ask(client, "POST", "/v1/domains/web/stop", status=200)
    problem = await ask(client, "POST", "/v1/domains/web/stop", status=409)
    assert problem["code"] in {"wrong-state", "conflict"}
    await ask(client, "POST", "/v1/domains/web/start", {"node": "nowhere"}, status=404)


async def test_an_owner_that_does_not_answer_makes_its_domains_unknown(
    client: Client, world: World
) -> None:
    await running(client, "b")
    await world.b.hub.close()
    domain = await ask(client, "GET", "/v1/domains/web", status=200)
    assert domain["state"] == DomainState.UNKNOWN
    assert "b" in domain["reason"]
    problem = await ask(client, "POST", "/v1/domains/web/pause", status=502)
    assert problem["code"] == "peer-unreachable"
    assert problem["detail"].startswith("domain web runs on b: b")
    assert "`ferry domain takeover web --to NODE`" in problem["detail"]


async def test_the_console(client: Client, world: World) -> None:
    await running(client, "b")
    path = world.b.hypervisor.console_log(DomainName("web"))
    await asyncio.to_thread(path.parent.mkdir, parents=True, exist_ok=True)
    await asyncio.to_thread(path.write_bytes, b"hello\nworld\n")
    async with client.get("/v1/domains/web/console?limit_bytes=6") as response:
        assert await response.read() == b"world\n"
        assert response.headers["Ferry-Node"] == "b"
        assert response.headers["Ferry-Console-End"] == "12"
    async with client.get("/v1/domains/web/console?offset=0&follow=true") as response:
        assert await response.content.readexactly(12) == b"hello\nworld\n"
        await asyncio.to_thread(_append, path, b"more\n")
        assert await response.content.readexactly(5) == b"more\n"
    await ask(client, "GET", "/v1/domains/nobody/console", status=404)
    problem = await ask(client, "GET", "/v1/domains/web/console?offset=x", status=400)
    assert "offset" in problem["fields"]
    await ask(client, "GET", "/v1/domains/web/console?follow=maybe", status=400)


def _append(path: Path, data: bytes) -> None:
    with path.open("ab") as file:
        file.write(data)


# --- migrations ----------------------------------------------------------------------------------


async def test_a_migration_goes_to_the_source_and_is_watched_and_cancelled(
    client: Client, world: World
) -> None:
    await running(client, "b")
    async with client.post("/v1/domains/web/migrations", json={"downtime_limit_ms": 9}) as answer:
        assert answer.status == 202
        assert answer.headers["Location"] == "/v1/migrations/m-1"
        migration = await answer.json()
    assert (migration["source"], migration["destination"]) == ("b", "a")
    assert migration["request"]["downtime_limit_ms"] == 9
    assert (await ask(client, "GET", "/v1/domains/web", status=200))["migration"] == "m-1"
    listed = await ask(client, "GET", "/v1/migrations", status=200)
    assert [each["id"] for each in listed["migrations"]] == ["m-1"]
    assert (await ask(client, "GET", "/v1/migrations/m-1", status=200))["state"] == "precopy"
    body = {"bandwidth_bytes_per_s": 1_000_000}
    limited = await ask(client, "PATCH", "/v1/migrations/m-1", body, status=200)
    assert limited["request"]["bandwidth_bytes_per_s"] == 1_000_000
    body = {"bandwidth_bytes_per_s": 1}
    problem = await ask(client, "PATCH", "/v1/migrations/m-1", body, status=400)
    assert "bandwidth_bytes_per_s" in problem["fields"]
    cancelled = await ask(client, "DELETE", "/v1/migrations/m-1", status=202)
    assert cancelled["state"] == MigrationState.CANCELLED
    assert cancelled["cancelled_by"] == "somebody at 127.0.0.1"
    problem = await ask(client, "DELETE", "/v1/migrations/m-1", status=409)
    assert "was cancelled already, at 2" in problem["detail"]
    await ask(client, "GET", "/v1/migrations/m-9", status=404)
    await ask(client, "DELETE", "/v1/migrations/m-9", status=404)


async def test_a_refusal_has_every_reason_and_a_dry_run_has_them_too(
    client: Client, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def one_way(model: str, source: NodeView, destination: NodeView) -> str:
        return f"{model} {source.info.name} {destination.info.name}"

    monkeypatch.setattr("node_agent.cluster.one_way", one_way)
    await running(client)
    path = "/v1/domains/web/migrations"
    fine = await ask(client, "POST", f"{path}?dry_run=true", {"destination": "b"}, status=200)
    assert (fine["destination"], fine["refused"]) == ("b", [])
    assert fine["prediction"]["converges"] is True
    assert fine["remark"] == "qemu64 a b"
    native = {"destination": "b", "engine": "native", "mode": "hybrid"}
    theirs = await ask(client, "POST", f"{path}?dry_run=true", native, status=200)
    assert "pre-copy alone instead of hybrid" in theirs["engine_reason"]
    assert theirs["prediction"]["packed_share"] == 1.0, "QEMU's own migration packs nothing"
    world.a.migrations.reasons = ["memory", "bridge"]
    result = await ask(client, "POST", f"{path}?dry_run=true", {"destination": "b"}, status=200)
    assert result["refused"] == ["memory", "bridge"]
    problem = await ask(client, "POST", path, {"destination": "b"}, status=409)
    assert (problem["code"], problem["reasons"]) == ("refused", ["memory", "bridge"])
    assert not world.migrations
    await ask(client, "POST", "/v1/domains/web/stop", status=200)
    await ask(client, "POST", path, {"destination": "b"}, status=409)
    stopped = await ask(client, "POST", f"{path}?dry_run=1", {}, status=200)
    assert "stopped" in stopped["refused"][0]
    assert stopped["prediction"] is None


@pytest.mark.parametrize("node", ["a", "b"])
async def test_the_dirty_rate_is_the_owners_word(client: Client, world: World, node: str) -> None:
    await running(client, node)
    rate = await ask(client, "GET", "/v1/domains/web/dirty-rate?seconds=0.5", status=200)
    assert (rate["node"], rate["seconds"]) == (node, 0.5)
    assert (await ask(client, "GET", "/v1/domains/web/dirty-rate", status=200))["seconds"] == 1.0
    path = "/v1/domains/web/migrations?dry_run=true&sample_seconds=2.5"
    dry = await ask(client, "POST", path, status=200)
    assert "sampled over 2.5 s" in dry["prediction"]["dirty_rate_origin"]
    assert dry["prediction"]["packed_share"] == 0.5
    for wrong in ("0", "61", "soon", "nan", "-1", ""):
        problem = await ask(
            client, "GET", f"/v1/domains/web/dirty-rate?seconds={wrong}", status=400
        )
        assert "from 0.1 to 60" in problem["fields"]["seconds"]
    for each in (world.a, world.b):
        each.migrations.unpredictable = "domain web is being migrated"
    await ask(client, "GET", "/v1/domains/web/dirty-rate", status=409)
    dry = await ask(client, "POST", "/v1/domains/web/migrations?dry_run=true", status=200)
    assert dry["prediction"] is None
    assert "is being migrated" in dry["prediction_unknown"]
    await ask(client, "POST", "/v1/domains/web/stop", status=200)
    await ask(client, "GET", "/v1/domains/web/dirty-rate", status=409)
    await ask(client, "GET", "/v1/domains/nobody/dirty-rate", status=404)


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"downtime_limit_ms": 0}, "downtime_limit_ms"),
        ({"timeout_s": "soon"}, "timeout_s"),
        ({"on_timeout": "explode"}, "on_timeout"),
        ({"bandwidth_bytes_per_s": 1}, "bandwidth_bytes_per_s"),
        ({"destination": "A B"}, "destination"),
        ({"downtime_limit": 5}, "downtime_limit"),
    ],
)
async def test_a_wrong_migration_names_the_field(
    client: Client, body: dict[str, Any], field: str
) -> None:
    await running(client)
    problem = await ask(client, "POST", "/v1/domains/web/migrations", body, status=400)
    assert problem["fields"][field]
    assert field in problem["detail"]


# --- nodes, health -------------------------------------------------------------------------------


async def test_health_follows_the_store(client: Client, world: World) -> None:
    assert (await ask(client, "GET", "/healthz", status=200))["status"] == "ok"
    world.a.store.faults.unavailable = True
    problem = await ask(client, "GET", "/healthz", status=503)
    assert problem["code"] == "store-unavailable"
    world.a.store.faults.unavailable = False


async def test_health_and_the_list_of_nodes_say_that_the_store_takes_no_writes(
    client: Client, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk: everything can be read, and every node seems to be silent."""

    async def full() -> None:
        raise StoreError("database or disk is full")

    async def health() -> int:
        async with client.get("/healthz") as response:
            return response.status

    async def until(status: int) -> None:
        async with asyncio.timeout(20.0):
            while await health() != status:  # noqa: ASYNC110 - it says nothing
                await asyncio.sleep(0.01)

    registry = world.a.registry
    with monkeypatch.context() as patch:
        patch.setattr(registry, "beat", full)
        await until(503)
        problem = await ask(client, "GET", "/healthz", status=503)
        assert "this node's heartbeat isn't written: database or disk is full" in problem["detail"]
        nodes = (await ask(client, "GET", "/v1/nodes", status=200))["nodes"]
        told = {each["name"]: each["trouble"] for each in nodes}
        assert told["a"] == "database or disk is full"
        assert not any(text for name, text in told.items() if name != "a")
    await until(200)


# --- events --------------------------------------------------------------------------------------


async def _sse(client: Client, headers: dict[str, str], count: int) -> list[tuple[int, str]]:
    """The id and kind of the first `count` messages."""
    found: list[tuple[int, str]] = []
    headers = {"Accept": "text/event-stream"} | headers
    async with asyncio.timeout(30), client.get("/v1/events", headers=headers) as response:
        assert response.content_type == "text/event-stream"
        seq = 0
        async for line in response.content:
            name, _, value = line.decode().strip().partition(": ")
            if name == "id":
                seq = int(value)
            elif name == "event":
                found.append((seq, value))
                if len(found) == count:
                    break
    return found


async def test_events_are_streamed_and_resumed(client: Client, world: World) -> None:
    await running(client)
    stream = asyncio.create_task(_sse(client, {"Last-Event-ID": "0"}, 3))
    await asyncio.sleep(0.1)
    await ask(client, "POST", "/v1/domains/web/pause", status=200)
    messages = await stream
    kinds = ["domain-defined", "domain-started", "domain-paused"]
    assert [kind for _, kind in messages] == kinds
    resumed = await _sse(client, {"Last-Event-ID": str(messages[0][0])}, 2)
    assert resumed == messages[1:]
    async with client.get("/v1/events", headers={"Accept": "application/json"}) as response:
        assert [each["kind"] for each in (await response.json())["events"]] == kinds
    async with client.get("/v1/events", headers={"Last-Event-ID": "x"}) as response:
        assert response.status == 400
    assert "limit" in (await ask(client, "GET", "/v1/events?limit=5", status=400))["fields"]


async def test_a_stream_whose_store_goes_away_ends_with_the_reason(
    client: Client, world: World
) -> None:
    await running(client)
    headers = {"Accept": "text/event-stream"}
    async with asyncio.timeout(30), client.get("/v1/events", headers=headers) as response:
        await response.content.readline()
        world.a.store.faults.unavailable = True
        await world.b.domains.define(spec_of("other", disks=[], nics=[]))
        lines = [line.decode().rstrip() async for line in response.content]
    *_, told, end = lines
    assert told.startswith(f"{AWAY}the simulated store is unavailable") and end == ""


async def test_a_mistyped_parameter_begins_nothing(client: Client, world: World) -> None:
    await running(client)
    path = "/v1/domains/web/migrations"
    for wrong, right in (("dryrun=true", "did you mean dry_run?"), ("x=1", "dry_run")):
        problem = await ask(client, "POST", f"{path}?{wrong}", {"destination": "b"}, status=400)
        assert right in problem["fields"][wrong.partition("=")[0]]
    await ask(client, "GET", "/v1/domains?page=2", status=400)
    await ask(client, "GET", "/healthz?from=probe", status=200)
    assert not world.migrations


async def test_a_silent_stream_has_heartbeats_and_ends_with_the_server(
    client: Client, world: World
) -> None:
    async with asyncio.timeout(30), client.get("/v1/events") as response:
        text = b""
        while text.count(b": heartbeat") < 2:
            text += await response.content.readline()
        world.a.events.emit(EventKind.AGENT_STARTED, "here")
        assert client.server is not None
        app = client.server.app  # type: ignore[attr-defined]
        await app[STREAMS].close()
        with contextlib.suppress(Exception):
            await response.read()
