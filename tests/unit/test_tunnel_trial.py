"""Whether a migration's tunnel passes frames is known before any is diverted, or left open."""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection
from pathlib import Path
from typing import Any

import pytest

from migrator.errors import RemoteProtocolError
from migrator.model import Cutover, DomainName, MigrationState, NicSpec, NodeName
from migrator.ports import Tunnel, TunnelReport
from netfabric.simulated import SimulatedFabric
from node_agent.cluster_calls import Done
from node_agent.migrations import cutover as cutover_module
from node_agent.migrations import tunnel_trial
from node_agent.migrations.cutover import Expected
from node_agent.migrations.tunnel_trial import (
    TRIES_MIN,
    Passage,
    Trial,
    TunnelTrial,
    TunnelTrials,
    closed,
    complaint,
    passage,
)
from node_agent.migrations.witnesses import Move
from node_agent.peers import messages
from tests.unit.migration_world import WEB, MigrationWorld, eventually, migration_world

NIC = NicSpec(mac="52:54:00:aa:bb:cc", bridge="br0")
OTHER = NicSpec(mac="52:54:00:aa:bb:dd", bridge="br0")
TUNNEL = Tunnel(name="m1", local="192.0.2.1", remote="192.0.2.2", port=7782)
MOVE = Move(
    migration_id="m1",
    domain=WEB,
    source=NodeName("a"),
    destination=NodeName("b"),
    nics=(NIC, OTHER),
)


def trial(tries: int, *, short: bool = False, full: bool = False, made: bool = True) -> TunnelTrial:
    return TunnelTrial(tries=tries, report=TunnelReport(made=made, short=short, full=full))


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (trial(1, short=True, full=True), Passage.PASSES),
        (trial(0), Passage.UNKNOWN),
        (trial(TRIES_MIN - 1, short=True), Passage.UNKNOWN),
        (trial(TRIES_MIN, short=True), Passage.NARROW),
        (trial(TRIES_MIN), Passage.BLOCKED),
        (trial(0, made=False), Passage.MISSING),
    ],
)
def test_silence_is_believed_only_when_it_was_asked_often_enough(
    found: TunnelTrial, expected: Passage
) -> None:
    assert passage(found) is expected


def test_only_what_passes_nothing_is_not_diverted_and_each_nic_is_told_of() -> None:
    passes, narrow = trial(1, short=True, full=True), trial(TRIES_MIN, short=True)
    blocked, missing = trial(TRIES_MIN), trial(0, made=False)
    assert closed((passes, narrow, blocked, missing)) == {2, 3}
    assert complaint(MOVE, (passes, trial(0)), TUNNEL) is None
    text = complaint(MOVE, (blocked, narrow), TUNNEL) or ""
    assert f"NIC {NIC.mac}: nothing is forwarded" in text
    assert "a firewall on UDP port 7782 from 192.0.2.1 to 192.0.2.2" in text
    assert f"NIC {OTHER.mac}: full frames aren't forwarded" in text
    assert "drops IP fragments" in text
    assert "b couldn't make its end" in (complaint(MOVE, (missing,), TUNNEL) or "")


class OldNode:
    """A hub whose peers are older agents: they know no such question."""

    async def call(self, node: NodeName, method: str, *_: object, **__: object) -> object:
        raise RemoteProtocolError(f"{node} does not know the method {method}")


async def test_an_older_agent_leaves_it_open() -> None:
    fabric = SimulatedFabric()
    await fabric.prepare_arrival(WEB, MOVE.nics, TUNNEL)
    hub: Any = OldNode()
    trials = TunnelTrials(hub, fabric, departing=lambda _: None)
    under_way = Trial(MOVE)
    await trials.run(under_way)
    found = await trials.verdict(under_way)
    assert [passage(each) for each in found] == [Passage.UNKNOWN, Passage.UNKNOWN]
    assert closed(found) == frozenset()
    assert await trials.verdict(None) == ()
    answer = messages.unpack(messages.pack(Done()), Expected, "an older agent's answer")
    assert answer.tunnels == ()
    messages.unpack(messages.pack(Expected(tunnels=found)), Done, "to an older agent")


# --- a whole migration -----------------------------------------------------------------------


@pytest.fixture
async def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[MigrationWorld]:
    """Its pauses wait for every trial's end: simulated migrations are over before it."""
    monkeypatch.setattr(tunnel_trial, "VERDICT_S", 20.0)
    monkeypatch.setattr(cutover_module, "EXPECT_S", 30.0)
    async with migration_world(tmp_path, monkeypatch) as made:
        yield made


async def migrated(
    world: MigrationWorld, monkeypatch: pytest.MonkeyPatch
) -> tuple[Cutover, list[frozenset[int]]]:
    """A completed migration's cutover, and the NICs without which its frames were diverted."""
    fabric, diverted = world.a.node.fabric, list[frozenset[int]]()
    divert = fabric.divert

    async def noted(domain: DomainName, without: Collection[int] = ()) -> None:
        diverted.append(frozenset(without))
        await divert(domain, without)

    monkeypatch.setattr(fabric, "divert", noted)
    migration = await world.ended(await world.migrate())
    assert migration.state is MigrationState.COMPLETED
    found: list[Cutover] = []

    async def complete() -> bool:
        cutover = (await world.a.manager.get(migration.id)).cutover
        if cutover is None or cutover.forwarded_frames is None:
            return False
        found.append(cutover)
        return True

    await eventually(complete)
    return found[0], diverted


async def events_of(world: MigrationWorld) -> list[str]:
    return [each.kind for each in await world.a.node.events.read()]


async def test_a_tunnel_that_passes_is_used_and_not_spoken_of(
    world: MigrationWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    cutover, diverted = await migrated(world, monkeypatch)
    assert diverted == [frozenset()]
    assert cutover.problems == ()
    assert world.a.node.fabric.network.tried != {}
    assert "frames-not-forwarded" not in await events_of(world)


async def test_a_firewall_in_the_tunnels_way_is_told_of_and_nothing_is_sent_into_it(
    world: MigrationWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.a.node.fabric.network.tunnel_width_bytes = 0
    cutover, diverted = await migrated(world, monkeypatch)
    assert diverted == [frozenset({0})]
    assert any("firewall on UDP port 7782" in each for each in cutover.problems)
    assert cutover.verified_ms is not None, "the rest of it works"

    async def told() -> bool:
        return "frames-not-forwarded" in await events_of(world)

    await eventually(told)


async def test_where_full_frames_are_dropped_short_ones_are_forwarded_all_the_same(
    world: MigrationWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.a.node.fabric.network.tunnel_width_bytes = 1000
    cutover, diverted = await migrated(world, monkeypatch)
    assert diverted == [frozenset()]
    assert any("drops IP fragments" in each for each in cutover.problems)


async def test_a_destination_without_its_end_of_the_tunnel_is_sent_nothing(
    world: MigrationWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.b.node.fabric.faults.tunnel_fails = True
    cutover, diverted = await migrated(world, monkeypatch)
    assert diverted == [frozenset({0})]
    assert any("b couldn't make its end of the tunnel" in each for each in cutover.problems)
    assert any("simulated: no tunnel" in each for each in cutover.problems)


async def test_a_source_without_its_own_end_blames_no_firewall(
    world: MigrationWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.a.node.fabric.faults.tunnel_fails = True
    cutover, _ = await migrated(world, monkeypatch)
    assert any("frames won't be forwarded: simulated" in each for each in cutover.problems)
    assert not any("firewall" in each for each in cutover.problems)
