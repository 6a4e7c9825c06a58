"""Where a domain starts that nobody names a node for: among those that speak, and never twice."""

from __future__ import annotations

import re
import time
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest

from migrator.errors import ConflictError, NotFoundError, RefusedError
from migrator.model import DomainName, MigrationRequest, NodeName, NodeState, OwnershipState
from node_agent.drain.cordons import Cordon, Cordons
from node_agent.resources import MigrationCreate
from tests.unit.agent_world import World, open_world, spec_of
from tests.unit.api_client import Client, ask
from tests.unit.heartbeats import speak

WEB = DomainName("web")
A, B = NodeName("a"), NodeName("b")


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    """`web` is defined, and runs on `a`."""
    async with open_world(tmp_path) as opened:
        await opened.a.domains.define(spec_of())
        await opened.a.domains.start(WEB)
        yield opened


async def a_falls_silent(world: World) -> None:
    """For b, which hears of no heartbeat of it any more."""
    await world.a.registry.close()
    await world.b.registry.read()
    now, seen = time.monotonic(), world.b.registry._seen
    world.b.registry._monotonic = lambda: now  # It is told in seconds.
    seen["a"] = msgspec.structs.replace(seen["a"], at_monotonic_s=now - 60.0)
    assert (await world.b.registry.get(A)).state is NodeState.UNREACHABLE


async def test_what_a_silent_node_had_stopped_starts_elsewhere(world: World) -> None:
    """It was asked, and the start failed as that node's agent couldn't be reached."""
    await world.a.domains.stop(WEB)
    await a_falls_silent(world)
    assert (await world.b.cluster.start(WEB)).node == "b"


async def test_what_a_removed_node_had_stopped_starts_elsewhere(world: World) -> None:
    await world.a.domains.stop(WEB)
    await world.a.registry.close()
    world.b.registry.counts = lambda name: name != "a"
    assert (await world.b.cluster.start(WEB)).node == "b"


async def test_a_node_that_speaks_is_asked_where_it_ran_last(world: World) -> None:
    await world.a.domains.stop(WEB)
    assert (await world.b.cluster.start(WEB)).node == "a"


@pytest.mark.parametrize("asked", [None, A, B])
async def test_what_a_silent_node_may_run_is_started_nowhere(
    world: World, asked: NodeName | None
) -> None:
    await a_falls_silent(world)
    there = "b" if asked == B else "NODE"
    with pytest.raises(ConflictError) as refused:
        await world.b.cluster.start(WEB, asked)
    assert str(refused.value) == (
        "domain web was not started: a, which ran it last, has been silent for 60 s and may run it "
        f"still. `ferry domain takeover web --to {there}` starts it elsewhere, once its storage "
        "has shut a out (docs/bad-day.md)"
    )
    record = await world.b.ownership.read(WEB)
    assert record is not None
    assert (record.owner, record.token, record.state) == ("a", 1, OwnershipState.RUNNING)


async def test_each_node_that_can_t_take_it_says_why(world: World) -> None:
    await world.a.domains.stop(WEB)
    await a_falls_silent(world)
    cordon = Cordon(node="b", state=NodeState.CORDONED, since_s=1.0)
    await Cordons(world.b.typed).change(cordon, frozenset(NodeState))
    with pytest.raises(RefusedError) as refused:
        await world.b.cluster.start(WEB)
    assert str(refused.value) == (
        "domain web was not started: a, where it ran last, is silent, and no node can take it: "
        "a: it is unreachable: no heartbeat for 60 s; b: it is cordoned"
    )


async def test_rules_hold_where_nobody_chose(world: World) -> None:
    await world.a.domains.stop(WEB)
    spec = spec_of("pinned", disks=[], nics=[], placement={"pinned": ["a"]})
    await world.a.domains.define(spec)
    pinned = DomainName("pinned")
    await world.a.domains.start(pinned)
    await world.a.domains.stop(pinned)
    await a_falls_silent(world)
    with pytest.raises(RefusedError, match="b: the domain is pinned to a"):
        await world.b.cluster.start(pinned)
    assert (await world.b.cluster.start(pinned, B)).node == "b", "who names a node means it"


async def test_nobody_vouches_for_a_node_that_there_isn_t(world: World, client: Client) -> None:
    """It was refused (exit code 4) because the domain's node had another name."""
    body = {"node": "b", "powered_off": "nosuch"}
    problem = await ask(client, "POST", "/v1/domains/web/takeover", body, status=404)
    assert problem["detail"] == "powered_off: there is no node nosuch; known: a, b"
    with pytest.raises(NotFoundError):
        await world.b.cluster.take_over(WEB, B, NodeName("nosuch"))


async def test_a_removed_owner_may_be_vouched_for(world: World) -> None:
    world.volumes.enforces = False
    await world.a.registry.close()
    await world.a.hub.close()
    world.b.registry.counts = lambda name: name != "a"
    assert (await world.b.cluster.take_over(WEB, B, A)).node == "b"


async def test_rules_hold_where_nobody_chose_a_destination(world: World) -> None:
    """It was the node with the most free memory, be the domain never to run there."""
    near = spec_of("near", disks=[], nics=[], placement={"anti_affinity": ["web"]})
    await world.b.domains.define(near)
    await world.b.domains.start(DomainName("near"))
    with pytest.raises(RefusedError, match="b: a domain there doesn't want to be with web"):
        await world.b.cluster.migrate(WEB, MigrationCreate())
    assert not world.migrations
    tried = await world.b.cluster.check_migration(WEB, MigrationCreate(), 1.0)
    assert tried.refused[0].endswith("b: a domain there doesn't want to be with web"), tried
    await world.b.domains.stop(DomainName("near"))
    assert (await world.b.cluster.migrate(WEB, MigrationCreate())).destination == "b"


async def test_who_names_a_destination_means_it(world: World) -> None:
    near = spec_of("near", disks=[], nics=[], placement={"anti_affinity": ["web"]})
    await world.b.domains.define(near)
    await world.b.domains.start(DomainName("near"))
    begun = await world.b.cluster.migrate(WEB, MigrationCreate(destination="b"))
    assert begun.destination == "b"


async def c_and_d_are_heard_of(world: World) -> None:
    """With more memory, so they come first."""
    for name in ("c", "d"):
        told = msgspec.structs.replace(
            await world.b._describe(), name=name, memory_bytes=1 << 40, heartbeat_at_s=time.time()
        )
        await speak(world.b.typed, told)


def refuse(
    world: World, monkeypatch: pytest.MonkeyPatch, reasons: dict[str, list[str]]
) -> list[str]:
    """Where `web` runs, `reasons` are what speaks against each destination. Who was asked."""
    asked: list[str] = []

    async def check(_: str, request: MigrationRequest) -> list[str]:
        asked.append(request.destination)
        return reasons.get(request.destination, [])

    monkeypatch.setattr(world.a.migrations, "check", check)
    return asked


FULL = "its disk is full: 0 KiB free in /var/lib/ferry"


async def test_where_nobody_chose_the_next_one_is_asked(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It chose a node whose disk was full each time, and was refused, though another was free."""
    await c_and_d_are_heard_of(world)
    refusing = {"c": [f"node c: {FULL}"], "d": ["node d doesn't answer: no route"]}
    asked = refuse(world, monkeypatch, refusing)
    tried = await world.b.cluster.check_migration(WEB, MigrationCreate(), 1.0)
    assert (tried.destination, list(tried.refused)) == ("b", [])
    assert asked == ["c", "d", "b"]
    assert (await world.b.cluster.migrate(WEB, MigrationCreate())).destination == "b"


async def test_where_all_refuse_each_says_why(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    await c_and_d_are_heard_of(world)
    refusing = {"c": [f"node c: {FULL}"], "d": [f"node d: {FULL}"], "b": ["node b: no pool x"]}
    refuse(world, monkeypatch, refusing)
    expected = f"no node can take it: b: no pool x; c, d: {FULL}"
    with pytest.raises(RefusedError, match=re.escape(expected)):
        await world.b.cluster.migrate(WEB, MigrationCreate())
    tried = await world.b.cluster.check_migration(WEB, MigrationCreate(), 1.0)
    assert tried.refused[0].endswith(expected)


@pytest.mark.parametrize(
    "reasons", [["domain web is paused, it must be running"], ["node c: x", "a: no pool y"]]
)
async def test_what_no_destination_would_change_is_told_at_once(
    world: World, monkeypatch: pytest.MonkeyPatch, reasons: list[str]
) -> None:
    await c_and_d_are_heard_of(world)
    asked = refuse(world, monkeypatch, {"c": reasons})
    with pytest.raises(RefusedError) as refused:
        await world.b.cluster.migrate(WEB, MigrationCreate())
    assert refused.value.reasons == tuple(reasons)
    assert asked == ["c"]


async def test_a_destination_that_somebody_named_is_the_only_one_asked(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    await c_and_d_are_heard_of(world)
    asked = refuse(world, monkeypatch, {"c": [f"node c: {FULL}"]})
    with pytest.raises(RefusedError, match=FULL):
        await world.b.cluster.migrate(WEB, MigrationCreate(destination="c"))
    assert asked == ["c"]
