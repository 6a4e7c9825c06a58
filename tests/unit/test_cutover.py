"""A migration's network, with simulated fabrics: in step, proved, recorded, and harmless."""

from __future__ import annotations

import asyncio
import ipaddress
import time
from collections.abc import AsyncIterator, Collection
from pathlib import Path

import pytest

from migrator.errors import RefusedError
from migrator.model import (
    Cutover,
    DomainName,
    MigrationRequest,
    MigrationState,
    NicSpec,
    NodeName,
)
from migrator.ports import Connection, DomainEvent, DomainEventKind, ProbeReport, WidthReport
from netfabric.frames import gratuitous_arp_request, parse_mac
from node_agent.cli.cutover import cutover_text
from node_agent.migrations import cutover as cutover_module
from node_agent.migrations import late_cutover
from node_agent.migrations.cutover import PROBE_S
from node_agent.migrations.cutover_settings import CutoverSettings
from node_agent.migrations.path_check import KNOWN_S, PathCheck
from node_agent.migrations.witnesses import Move
from tests.unit.migration_world import WEB, MigrationWorld, eventually, migration_world


@pytest.fixture
async def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[MigrationWorld]:
    async with migration_world(tmp_path, monkeypatch) as made:
        yield made


def give_up_soon(world: MigrationWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = CutoverSettings(grace_s=0.3, verify_limit_s=1.0)
    monkeypatch.setattr(world.b.manager._site._cutover, "_settings", settings)


async def recorded(world: MigrationWorld, id: str) -> Cutover:
    found: list[Cutover] = []

    async def complete() -> bool:
        cutover = (await world.a.manager.get(id)).cutover
        if cutover is None or cutover.forwarded_frames is None:
            return False
        found.append(cutover)
        return True

    await eventually(complete)
    return found[0]


async def test_the_outcome_is_part_of_the_migrations_record(world: MigrationWorld) -> None:
    migration = await world.ended(await world.migrate())
    cutover = await recorded(world, migration.id)
    assert migration.state is MigrationState.COMPLETED
    assert cutover.first_announcement_ms is not None
    assert cutover.verified_ms is not None
    assert cutover.suspect == ""
    assert [(each.node, each.answered) for each in cutover.witnesses] == [("a", ("10.0.0.7",))]
    assert not world.a.node.fabric.diverted
    assert not world.b.node.fabric.closed


async def test_announcements_that_are_lost_are_repeated_until_one_is_heard(
    world: MigrationWorld,
) -> None:
    world.b.node.fabric.faults.frames_lost = 5
    migration = await world.ended(await world.migrate())
    cutover = await recorded(world, migration.id)
    assert cutover.verified_ms is not None
    network = world.b.node.fabric.network
    assert [one.lost for one in network.announcements].count(True) == 5


@pytest.mark.parametrize("step_s", [3600.0, -3600.0])
async def test_a_clock_that_is_set_meanwhile_makes_nothing_of_it_wrong(
    world: MigrationWorld, monkeypatch: pytest.MonkeyPatch, step_s: float
) -> None:
    """It was an hour late, and told of as a network that doesn't follow; or an hour early."""
    world.b.node.fabric.faults.frames_lost = 5  # It takes more than one round, as a rule.
    service = world.b.manager._site._cutover
    monkeypatch.setattr(service, "_clock", lambda: time.time() + step_s)
    migration = await world.ended(await world.migrate())
    cutover = await recorded(world, migration.id)
    assert cutover.verified_ms is not None and 0.0 <= cutover.verified_ms < 60_000.0


async def test_a_network_that_does_not_follow_is_told_of(
    world: MigrationWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    give_up_soon(world, monkeypatch)
    world.b.node.fabric.faults.frames_lost = 10_000
    migration = await world.ended(await world.migrate())
    cutover = await recorded(world, migration.id)
    assert migration.state is MigrationState.COMPLETED
    assert cutover.verified_ms is None
    assert "port security" in cutover.suspect

    async def told() -> bool:
        events = await world.a.node.events.read()
        return any(each.kind == "network-not-verified" for each in events)

    await eventually(told)


async def test_of_a_guest_that_stands_still_the_network_is_not_suspected(
    world: MigrationWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk's error has paused it: that was told as a switch's port security."""
    give_up_soon(world, monkeypatch)
    world.b.node.fabric.faults.frames_lost = 10_000

    def pause(event: DomainEvent) -> None:
        if event.kind is DomainEventKind.RESUMED:
            world.b.node.host.emit(WEB, DomainEventKind.PAUSED)

    world.b.node.hypervisor.subscribe(pause)
    migration = await world.ended(await world.migrate())
    cutover = await recorded(world, migration.id)
    assert cutover.suspect.startswith("the guest stands still, and answers nobody")


@pytest.mark.parametrize("how", ["moved on to a", "ended"])
async def test_a_guest_that_is_gone_before_it_was_found_is_not_complained_of(
    world: MigrationWorld, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    monkeypatch.setattr(cutover_module, "PROBE_GAPS_S", (0.0, *(0.02,) * 1_000))
    world.b.node.fabric.faults.frames_lost = 10_000
    migration = await world.ended(await world.migrate())
    if how == "ended":
        world.b.node.host.kill(WEB)
    else:
        await world.until(lambda: not world.b.manager._runners)
        await world.b.manager.create(WEB, MigrationRequest(destination="a"))
        await world.until(lambda: world.running() == ["a"])
    found: list[Cutover] = []

    async def told() -> bool:
        cutover = (await world.a.manager.get(migration.id)).cutover
        found.extend([cutover] if cutover is not None else [])
        return bool(found)

    await eventually(told)
    assert (found[0].left_early, found[0].verified_ms, found[0].suspect) == (how, None, "")
    assert f"not verified: the guest {how} before" in cutover_text(found[0])
    events = await world.a.node.events.read()
    assert [e for e in events if e.kind == "network-not-verified" and e.domain == WEB] == []


async def test_a_guest_that_comes_back_from_a_switchover_is_looked_for_all_the_same(
    world: MigrationWorld,
) -> None:
    world.b.node.fabric.faults.frames_lost = 10_000
    await world.ended(await world.migrate())
    service = world.b.manager._site._cutover
    arrived = service._arriving[WEB]
    back = Move(
        migration_id="back",
        domain=WEB,
        source=NodeName("b"),
        destination=NodeName("a"),
        nics=arrived.move.nics,
    )
    await service.prepare_departure(back)
    world.b.node.host.emit(WEB, DomainEventKind.PAUSED)
    await world.until(lambda: arrived.left_early == "moved on to a")
    await service.stays(back)
    assert arrived.left_early == ""


async def test_who_is_asked_has_the_time_to_answer(
    world: MigrationWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A question that nobody could have answered is no evidence for a suspect."""
    given_s: list[float] = []

    async def silent(nic: NicSpec, timeout_s: float) -> ProbeReport:
        given_s.append(timeout_s)
        await asyncio.sleep(timeout_s)
        return ProbeReport(able=True)

    give_up_soon(world, monkeypatch)
    monkeypatch.setattr(world.a.node.fabric, "probe", silent)
    monkeypatch.setattr(cutover_module, "PROBE_GAPS_S", (0.0, 10.0))
    migration = await world.ended(await world.migrate())
    assert (await recorded(world, migration.id)).verified_ms is None
    assert given_s != []
    assert all(each >= PROBE_S for each in given_s[1:])


async def test_a_guest_that_stays_has_its_ports_back(world: MigrationWorld) -> None:
    await world.a.node.fabric.divert(WEB)
    await world.a.node.fabric.shut(WEB)
    migration = await world.migrate(destination="b")
    await world.a.manager.cancel(migration.id)
    ended = await world.ended(migration)
    assert ended.state is MigrationState.CANCELLED
    assert not world.a.node.fabric.diverted
    assert not world.a.node.fabric.closed


async def test_a_guest_that_leaves_again_within_the_grace_time_is_forwarded_to_for_another(
    world: MigrationWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The earlier move's grace time ended the later one's forwarding, and had its count."""
    service, ended = world.a.manager._site._cutover, list[DomainName]()

    async def end_departure(domain: DomainName) -> int:
        ended.append(domain)
        return 3

    monkeypatch.setattr(world.a.node.fabric, "end_departure", end_departure)
    monkeypatch.setattr(service, "_settings", CutoverSettings(grace_s=0.05, verify_limit_s=0.0))
    monkeypatch.setattr(cutover_module, "_CALL_S", 0.0)
    spec = (await world.a.node.records.get(WEB)).spec
    for number in (1, 2):
        move = Move(
            migration_id=f"m{number}",
            domain=WEB,
            source=NodeName("a"),
            destination=NodeName("b"),
            nics=spec.nics,
        )
        await service.prepare_departure(move)
        service.left(move)
    await world.until(lambda: not service._asides.tasks)
    assert ended == [WEB]


async def test_a_store_that_is_away_keeps_no_tunnel_up(
    world: MigrationWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was to be noted of the move failed, and with it all that was to come."""
    service, node = world.a.manager._site._cutover, world.a.node
    monkeypatch.setattr(service, "_settings", CutoverSettings(grace_s=0.05, verify_limit_s=0.0))
    monkeypatch.setattr(cutover_module, "_CALL_S", 0.0)
    move = Move(
        migration_id="m1",
        domain=WEB,
        source=NodeName("a"),
        destination=NodeName("b"),
        nics=(await node.records.get(WEB)).spec.nics,
    )
    await service.prepare_departure(move)
    await node.fabric.divert(WEB)
    service._records.of("m1").cutover = Cutover(resumed_at_s=1.0)
    node.store.faults.unavailable = True
    service.left(move)
    await world.until(lambda: not service._asides.tasks)
    node.store.faults.unavailable = False
    assert not node.fabric.diverted


async def test_a_network_that_is_too_narrow_is_found_before_anything_moves(
    world: MigrationWorld,
) -> None:
    world.a.node.fabric.network.width_bytes = 1400
    with pytest.raises(RefusedError, match="doesn't carry frames of 1500 bytes to b"):
        await world.migrate()
    assert world.running() == ["a"]
    world.a.node.fabric.network.width_bytes = 1500
    migration = await world.ended(await world.migrate())
    assert migration.state is MigrationState.COMPLETED


async def test_a_network_that_has_become_too_narrow_is_found_before_the_guest_leaves(
    world: MigrationWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = world.a.manager._site._path
    spec, b = (await world.a.node.records.get(WEB)).spec, NodeName("b")
    assert await path.reasons(spec, b) == []
    later_s = time.monotonic() + KNOWN_S + 1.0
    monkeypatch.setattr(path, "_monotonic", lambda: later_s)
    world.a.node.fabric.network.width_bytes = 1400
    migration = await world.ended(await world.migrate())
    assert migration.state is MigrationState.FAILED
    assert "doesn't carry frames of 1500 bytes to b" in str(migration.error)
    assert world.running() == ["a"]
    with pytest.raises(RefusedError, match="doesn't carry frames of 1500 bytes to b"):
        await world.migrate()


async def test_an_agent_that_restarted_measures_before_its_guest_leaves(
    world: MigrationWorld,
) -> None:
    node, b = world.a.node, NodeName("b")
    restarted = PathCheck(node.hub, node.fabric)
    node.fabric.network.width_bytes = 1400
    spec = (await node.records.get(WEB)).spec
    assert len(await restarted.renewed("m1", spec, b)) == 1
    await restarted.forget("m1")
    await restarted.close()


async def test_a_node_whose_network_leads_nowhere_is_not_moved_to(
    world: MigrationWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def cut_off(nic: NicSpec, token: bytes, timeout_s: float) -> WidthReport:
        return WidthReport(cut_off="it has heard of no other node")

    monkeypatch.setattr(world.b.node.fabric, "hear_wide", cut_off)
    with pytest.raises(RefusedError, match="leads nowhere from b: it has heard of no other node"):
        await world.migrate()
    assert world.running() == ["a"]


async def test_a_network_that_is_mended_later_is_seen_to_follow(
    world: MigrationWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    give_up_soon(world, monkeypatch)
    monkeypatch.setattr(late_cutover, "GAPS_S", (1.0, *((0.05,) * 200)))
    faults = world.b.node.fabric.faults
    faults.frames_lost = 1_000_000
    migration = await world.ended(await world.migrate())
    assert (await recorded(world, migration.id)).verified_ms is None
    faults.frames_lost = 0

    async def mended() -> bool:
        cutover = (await world.a.manager.get(migration.id)).cutover
        return cutover is not None and cutover.verified_ms is not None

    await eventually(mended)
    kinds = [each.kind for each in await world.a.node.events.read()]
    assert kinds.index("network-not-verified") < kinds.index("network-verified")


async def test_a_way_that_was_wide_enough_is_asked_again_after_a_while(
    world: MigrationWorld,
) -> None:
    node, now = world.a.node, [100.0]
    check = PathCheck(node.hub, node.fabric, monotonic=lambda: now[0])
    spec, b = (await node.records.get(WEB)).spec, NodeName("b")
    assert await check.reasons(spec, b) == []
    node.fabric.network.width_bytes = 1400
    now[0] += KNOWN_S - 1.0
    assert await check.reasons(spec, b) == []
    now[0] += 2.0
    assert len(await check.reasons(spec, b)) == 1
    node.fabric.network.width_bytes = 1500
    assert await check.reasons(spec, b) == [], "what was too narrow is asked again at once"


async def test_what_a_guest_was_seen_to_use_moves_along(world: MigrationWorld) -> None:
    spec = (await world.a.node.records.get(WEB)).spec
    world.a.node.fabric.learns[spec.nics[0].mac] = ("10.0.0.8",)
    await world.ended(await world.migrate())
    announced = [one.frame for one in world.a.node.fabric.network.announcements]
    learnt = gratuitous_arp_request(parse_mac(spec.nics[0].mac), ipaddress.IPv4Address("10.0.0.8"))
    assert learnt in announced


ITS_OWN = Connection(version=4, entry=b"10.0.0.7 192.0.2.1")
WITH_A_NEIGHBOUR = Connection(version=4, entry=b"10.0.0.7 192.0.2.77")
ANOTHERS = Connection(version=4, entry=b"10.0.0.9 192.0.2.1")


async def test_connections_that_stateful_rules_know_move_along(world: MigrationWorld) -> None:
    world.a.tracker.known = {ITS_OWN, WITH_A_NEIGHBOUR, ANOTHERS}
    world.a.tracker.own = frozenset({"192.0.2.77"})
    migration = await world.ended(await world.migrate())
    cutover = await recorded(world, migration.id)
    assert world.b.tracker.known == {ITS_OWN, WITH_A_NEIGHBOUR}
    assert world.a.tracker.known == {WITH_A_NEIGHBOUR, ANOTHERS}, "what passes here on is kept"
    assert cutover.connections is not None
    assert (cutover.connections.moved, cutover.connections.begun_late) == (2, 0)
    assert cutover.problems == ()


async def test_a_connection_that_begins_just_before_the_pause_moves_too(
    world: MigrationWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    fabric, divert = world.a.node.fabric, world.a.node.fabric.divert

    async def begin(domain: DomainName, without: Collection[int] = ()) -> None:
        world.a.tracker.known.add(ITS_OWN)
        await divert(domain, without)

    monkeypatch.setattr(fabric, "divert", begin)
    migration = await world.ended(await world.migrate())
    cutover = await recorded(world, migration.id)
    assert world.b.tracker.known == {ITS_OWN}
    assert cutover.connections is not None
    assert (cutover.connections.moved, cutover.connections.begun_late) == (1, 1)


async def test_a_kernel_that_cannot_be_told_connections_is_an_event_and_no_failure(
    world: MigrationWorld,
) -> None:
    world.a.tracker.known = {ITS_OWN}
    world.b.tracker.unable = "simulated: connection tracking can't be told anything"
    migration = await world.ended(await world.migrate())
    cutover = await recorded(world, migration.id)
    assert migration.state is MigrationState.COMPLETED
    assert any("may cut connections" in each for each in cutover.problems)

    async def told() -> bool:
        events = await world.a.node.events.read()
        return any(each.kind == "connections-not-moved" for each in events)

    await eventually(told)


async def test_a_destination_that_is_given_up_forgets_what_it_was_told(
    world: MigrationWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The source's guest stays, and its connections with it."""
    world.a.tracker.known = {ITS_OWN}

    async def fail(domain: DomainName, without: Collection[int] = ()) -> None:
        world.b.node.hypervisor.host.kill(domain)

    monkeypatch.setattr(world.a.node.fabric, "divert", fail)
    ended = await world.ended(await world.migrate())
    assert ended.state is not MigrationState.COMPLETED

    async def forgotten() -> bool:
        return not world.b.tracker.known

    await eventually(forgotten)
    assert world.a.tracker.known == {ITS_OWN}
