"""Domains of a node: ownership before vCPUs, everything undone on failure, records kept true."""

from __future__ import annotations

import asyncio
import contextlib
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from migrator.errors import (
    ConflictError,
    FerryError,
    HypervisorError,
    InvalidRequest,
    NotFoundError,
    StoreError,
    WrongStateError,
)
from migrator.model import (
    DomainName,
    DomainState,
    FencingToken,
    MigrationId,
    NodeName,
    NodeState,
    OwnershipRecord,
    OwnershipState,
    VolumeName,
)
from node_agent.background import uninterrupted
from node_agent.domain_restart import TRIES
from node_agent.nodes import NodeRegistry
from tests.unit.agent_world import MAC, SimulatedNode, World, spec_of
from tests.unit.node_life import eventually

WEB = DomainName("web")
ROOT = VolumeName("root")


async def owned(node: SimulatedNode) -> tuple[int, str, OwnershipState]:
    record = await node.ownership.read(WEB)
    assert record is not None
    return record.token, record.owner, record.state


async def state(node: SimulatedNode) -> DomainState:
    return (await node.domains.status(WEB)).state


async def test_a_start_takes_ownership_fences_and_runs(world: World) -> None:
    record = await world.a.domains.define(spec_of())
    assert record.spec.machine == "pc-q35-7.2"
    await world.a.domains.start(WEB)
    assert await owned(world.a) == (1, "a", OwnershipState.RUNNING)
    assert await world.b.pool.verify(ROOT) == 1
    assert await state(world.a) is DomainState.RUNNING
    assert world.a.fabric.plugged


async def test_a_stop_gives_everything_back_and_the_next_start_has_a_newer_token(
    world: World,
) -> None:
    await world.a.domains.define(spec_of())
    await world.a.domains.start(WEB)
    assert await world.a.domains.stop(WEB)
    assert await owned(world.a) == (1, "a", OwnershipState.STOPPED)
    assert not world.a.fabric.plugged
    await world.b.domains.start(WEB)
    assert await owned(world.b) == (2, "b", OwnershipState.RUNNING)


async def test_who_runs_it_is_said(world: World) -> None:
    await world.a.domains.define(spec_of())
    await world.a.domains.start(WEB)
    with pytest.raises(ConflictError, match="runs on a "):
        await world.b.domains.start(WEB)
    with pytest.raises(ConflictError, match="runs on a already"):
        await world.a.domains.start(WEB)
    with pytest.raises(ConflictError, match="runs on a, not on b"):
        await world.b.domains.pause(WEB)
    with pytest.raises(WrongStateError, match=r"runs on a; .*`ferry domain stop web`"):
        await world.a.domains.delete(WEB)


@pytest.mark.parametrize("step", ["remove", "forget"])
async def test_what_is_started_while_it_is_deleted_keeps_its_definition(
    world: World, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """It ran without one: nobody could stop it, and its volumes were free for other domains."""
    await world.a.domains.define(spec_of())
    owner: Any = world.a.records if step == "remove" else world.a.domains.ownership
    then, started = getattr(owner, step), False

    async def raced(domain: DomainName) -> None:
        nonlocal started
        with contextlib.suppress(NotFoundError):
            await world.b.domains.start(WEB)
            started = True
        await then(domain)

    monkeypatch.setattr(owner, step, raced)
    if step == "remove":
        with pytest.raises(WrongStateError, match="runs on b"):
            await world.a.domains.delete(WEB)
    else:
        await world.a.domains.delete(WEB)
    defined = WEB in await world.a.records.list_records()
    assert (started, defined) == ((True, True) if step == "remove" else (False, False))
    if started:
        await world.b.domains.stop(WEB)


@pytest.mark.parametrize("node", ["a", "b"])
async def test_a_deletion_that_was_cut_short_is_finished_by_the_next(
    world: World, monkeypatch: pytest.MonkeyPatch, node: str
) -> None:
    """The definition was gone, the record was left, and to delete it was refused: not defined."""
    await world.a.domains.define(spec_of())
    await world.a.domains.start(WEB)
    await world.a.domains.stop(WEB)

    async def cut_short(_: OwnershipRecord) -> bool:
        raise StoreError("no answer")

    with monkeypatch.context() as patched:
        patched.setattr(world.a.ownership, "remove", cut_short)
        with pytest.raises(StoreError):
            await world.a.domains.delete(WEB)
    assert WEB not in await world.a.records.list_records()
    await (world.a if node == "a" else world.b).domains.delete(WEB)
    assert await world.a.ownership.read(WEB) is None
    with pytest.raises(NotFoundError):
        await world.a.domains.delete(WEB)


async def test_two_deletions_at_once_are_one(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second one removes the record before the first: nothing is put back."""
    await world.a.domains.define(spec_of())
    await world.a.domains.start(WEB)
    await world.a.domains.stop(WEB)
    remove = world.a.ownership.remove

    async def later(record: OwnershipRecord) -> bool:
        await world.b.domains.delete(WEB)
        return await remove(record)

    monkeypatch.setattr(world.a.ownership, "remove", later)
    await world.a.domains.delete(WEB)
    assert WEB not in await world.a.records.list_records()
    assert await world.a.ownership.read(WEB) is None


async def test_a_failed_start_leaves_nothing(world: World) -> None:
    await world.a.domains.define(spec_of())
    world.a.host.faults.failing["start"] = 1
    with pytest.raises(HypervisorError):
        await world.a.domains.start(WEB)
    assert await owned(world.a) == (1, "a", OwnershipState.STOPPED)
    assert not world.a.fabric.plugged
    assert not world.volumes.volumes[ROOT].opened
    world.a.fabric.faults.plug_fails = True
    with pytest.raises(FerryError):
        await world.a.domains.start(WEB)
    assert (await owned(world.a))[2] is OwnershipState.STOPPED
    world.a.fabric.faults.plug_fails = False
    await world.b.domains.start(WEB)


async def test_a_cancelled_start_is_undone(world: World) -> None:
    await world.a.domains.define(spec_of())
    world.a.host.faults.hanging.add("start")
    task = asyncio.create_task(world.a.domains.start(WEB))
    await eventually(lambda: _plugged(world.a))
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (await owned(world.a))[2] is OwnershipState.STOPPED
    assert not world.a.fabric.plugged


async def _plugged(node: SimulatedNode) -> bool:
    return bool(node.fabric.plugged)


async def test_a_domain_defined_anew_starts_above_what_fenced_its_volume(world: World) -> None:
    await world.a.domains.define(spec_of())
    await world.a.pool.fence(ROOT, FencingToken(41))
    assert (await world.a.domains.start(WEB)).token == 42
    await world.a.domains.stop(WEB)
    await world.a.domains.delete(WEB)
    assert await world.a.ownership.read(WEB) is None
    await world.a.domains.define(spec_of())
    assert (await world.a.domains.start(WEB)).token == 43


async def test_what_belongs_to_one_domain_is_refused_to_another(world: World) -> None:
    await world.a.domains.define(spec_of())
    with pytest.raises(ConflictError) as caught:
        await world.b.domains.define(spec_of("other"))
    for what in (MAC, "10.0.0.7", "default/root"):
        assert what in str(caught.value)
    with pytest.raises(ConflictError, match="defined already"):
        await world.b.domains.define(spec_of(disks=[], nics=[]))


async def test_of_two_definitions_at_the_same_time_one_stays(world: World) -> None:
    results = await asyncio.gather(
        world.a.domains.define(spec_of("one")),
        world.b.domains.define(spec_of("two")),
        return_exceptions=True,
    )
    assert sum(isinstance(result, ConflictError) for result in results) == 1
    assert len(await world.a.records.list_records()) == 1


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"nics": [{"mac": "01:00:5e:00:00:01", "bridge": "br0"}]}, "nics[0].mac"),
        ({"nics": [{"mac": MAC, "bridge": "br0"}] * 2}, "nics[1].mac"),
        (
            {"nics": [{"mac": MAC, "bridge": "br0", "addresses": ["10.0.0.0/8"]}]},
            "nics[0].addresses[0]",
        ),
        (
            {"nics": [{"mac": MAC, "bridge": "br0", "addresses": ["224.0.0.1"]}]},
            "nics[0].addresses[0]",
        ),
        ({"disks": [{"volume": "root", "pool": "nowhere"}]}, "disks[0].pool"),
        ({"disks": [{"volume": "root"}] * 2}, "disks[1].volume"),
        ({"machine": "pc-q35-99.0"}, "machine"),
    ],
)
async def test_a_wrong_definition_names_the_field(
    world: World, changes: dict[str, Any], field: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        await world.a.domains.define(spec_of(**changes))
    assert field in caught.value.fields
    with pytest.raises(NotFoundError):
        await world.a.records.get(WEB)


async def test_pause_resume_reset(world: World) -> None:
    await world.a.domains.define(spec_of())
    with pytest.raises(WrongStateError, match=r"is stopped .*`ferry domain start web`"):
        await world.a.domains.pause(WEB)
    await world.a.domains.start(WEB)
    await world.a.domains.pause(WEB)
    assert await state(world.a) is DomainState.PAUSED
    await world.a.domains.resume(WEB)
    await world.a.domains.reset(WEB)
    world.a.host.fail_disk(WEB)
    assert await state(world.a) is DomainState.IO_ERROR
    await world.a.domains.resume(WEB)
    assert await state(world.a) is DomainState.RUNNING


async def test_a_migration_keeps_operations_off(world: World) -> None:
    await world.a.domains.define(spec_of())
    await world.a.domains.start(WEB)
    locks = world.a.domains.locks
    await locks.claim_for_migration(WEB, MigrationId("m-1"))
    await locks.claim_for_migration(WEB, MigrationId("m-1"))
    with pytest.raises(ConflictError, match="m-1"):
        await world.a.domains.stop(WEB)
    with pytest.raises(ConflictError, match="m-1"):
        await locks.claim_for_migration(WEB, MigrationId("m-2"))
    locks.release_from_migration(WEB, MigrationId("m-2"))
    assert locks.migration_of(WEB) == "m-1"
    world.a.host.kill(WEB)
    await asyncio.sleep(0.05)
    assert (await owned(world.a))[2] is OwnershipState.RUNNING
    locks.release_from_migration(WEB, MigrationId("m-1"))
    await eventually(lambda: _stopped(world.a))


async def test_what_comes_at_the_end_of_a_migration_waits_for_its_release(world: World) -> None:
    await world.a.domains.define(spec_of())
    await world.a.domains.start(WEB)
    locks = world.a.domains.locks
    await locks.claim_for_migration(WEB, MigrationId("m-1"))
    locks.end_migration(WEB, MigrationId("m-2"))
    with pytest.raises(ConflictError, match="m-1"):
        await world.a.domains.pause(WEB)
    locks.end_migration(WEB, MigrationId("m-1"))
    pausing = asyncio.create_task(world.a.domains.pause(WEB))
    with pytest.raises(ConflictError, match="m-1"):
        await locks.claim_for_migration(WEB, MigrationId("m-2"), wait_s=0.01)
    assert not pausing.done()
    locks.release_from_migration(WEB, MigrationId("m-1"))
    await pausing
    await locks.claim_for_migration(WEB, MigrationId("m-2"))


async def _stopped(node: SimulatedNode) -> bool:
    return (await owned(node))[2] is OwnershipState.STOPPED


async def test_a_guest_that_exits_is_stopped_and_reported(world: World) -> None:
    await world.a.domains.define(spec_of())
    await world.a.domains.start(WEB)
    world.a.host.power_off(WEB)
    await eventually(lambda: _stopped(world.a))
    assert not world.a.fabric.plugged
    await eventually(lambda: _reported(world.a, "domain-lost"))
    assert await _reported(world.a, "domain-exited")


async def test_a_domain_whose_hypervisor_died_is_started_again(world: World) -> None:
    await world.a.domains.define(spec_of())
    before = await world.a.domains.start(WEB)
    for number in range(1, TRIES + 1):
        world.a.host.kill(WEB, crashed=True)
        await eventually(partial(_started_again, world.a, number))
        assert await _runs_under(world.a, before.token + number)
    world.a.host.kill(WEB, crashed=True)
    await eventually(lambda: _reported(world.a, "domain-start-failed"))
    assert await _stopped(world.a)
    assert not world.a.fabric.plugged


async def test_a_crash_of_a_domain_that_moved_away_starts_nothing(world: World) -> None:
    await world.a.domains.define(spec_of())
    before = await world.a.domains.start(WEB)
    await world.a.ownership.compare_and_set(before, before.passed_to(NodeName("b")))
    world.a.host.kill(WEB, crashed=True)
    await eventually(lambda: _reported(world.a, "domain-exited"))
    await world.a.domains.ownership.settle(WEB)
    assert (await owned(world.a))[0] == before.token + 1


async def _runs_under(node: SimulatedNode, token: int) -> bool:
    record = await owned(node)
    return record[0] == token and record[2] is OwnershipState.RUNNING


async def _started_again(node: SimulatedNode, times: int) -> bool:
    """Told when its process is there; the record says so before."""
    kinds = [event.kind for event in await node.events.read()]
    return kinds.count("domain-started") == 1 + times


async def _reported(node: SimulatedNode, kind: str) -> bool:
    return any(event.kind == kind for event in await node.events.read())


async def _restart(node: SimulatedNode, claimed: tuple[DomainName, ...] = ()) -> None:
    """What an agent's restart does to domains: the guests are adopted."""
    await node.domains.close()
    await node.domains.open(await node.hypervisor.open(), claimed)


async def test_a_restart_adopts_what_is_ours_and_ends_what_is_not(world: World) -> None:
    await world.a.domains.define(spec_of())
    mine = await world.a.domains.start(WEB)
    await _restart(world.a)
    assert await state(world.a) is DomainState.RUNNING
    theirs = OwnershipRecord(domain=WEB, token=2, owner="b", state=OwnershipState.RUNNING)
    assert await world.a.ownership.compare_and_set(mine, theirs)
    await _restart(world.a, (WEB,))
    assert await state(world.a) is DomainState.RUNNING, "a journal claims it"
    await _restart(world.a)
    assert await state(world.a) is DomainState.STOPPED
    assert await owned(world.a) == (2, "b", OwnershipState.RUNNING)


async def test_a_restart_stops_the_record_of_a_guest_that_is_gone(world: World) -> None:
    await world.a.domains.define(spec_of())
    await world.a.domains.start(WEB)
    await world.a.domains.close()
    world.a.host.kill(WEB)
    await world.a.domains.open(await world.a.hypervisor.open())
    assert await owned(world.a) == (1, "a", OwnershipState.STOPPED)


async def test_a_restart_without_a_store_touches_no_guest(world: World) -> None:
    await world.a.domains.define(spec_of())
    await world.a.domains.start(WEB)
    await world.a.domains.close()
    world.a.store.faults.unavailable = True
    with pytest.raises(StoreError):
        await world.a.domains.open(await world.a.hypervisor.open())
    world.a.store.faults.unavailable = False
    assert await state(world.a) is DomainState.RUNNING


async def test_the_console_is_read_in_pieces(world: World) -> None:
    path = world.a.hypervisor.console_log(WEB)
    assert (await world.a.domains.console(WEB)).data == b""
    await asyncio.to_thread(_write, path, b"0123456789")
    tail = await world.a.domains.console(WEB, limit_bytes=4)
    assert (tail.offset, tail.data, tail.end) == (6, b"6789", 10)
    assert (await world.a.domains.console(WEB, offset=10)).data == b""
    assert (await world.a.domains.console(WEB, offset=99)).data == b"0123456789"


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


async def test_a_silent_node_is_unreachable_whatever_its_clock_says(world: World) -> None:
    await world.a.registry.close()
    await world.b.registry.close()
    moment = 1e6
    registry = NodeRegistry(world.a.typed, world.a.registry._describe, monotonic=lambda: moment)
    views = await registry.read()
    assert {view.state for view in views.values()} == {NodeState.READY}
    moment += 200
    await registry.beat()
    views = await registry.read()
    assert views[world.a.name].state is NodeState.READY
    assert views[world.b.name].state is NodeState.UNREACHABLE


async def test_a_node_that_comes_back_knows_how_long_it_was_silent(world: World) -> None:
    registry = world.a.registry
    await registry.close()
    store, describe = world.a.typed, registry._describe
    await NodeRegistry(store, describe, clock=lambda: 1e6).beat()
    back = NodeRegistry(store, describe, clock=lambda: 1e6 + 30.0)
    assert back.silent_s is None
    await back.open()
    await back.close()
    assert back.silent_s == 30.0


async def test_uninterrupted_work_ends_before_the_cancellation() -> None:
    begun, may_end = asyncio.Event(), asyncio.Event()
    done: list[str] = []

    async def work() -> None:
        begun.set()
        await may_end.wait()
        done.append("work")

    task = asyncio.create_task(uninterrupted(work()))
    await begun.wait()
    task.cancel()
    await asyncio.sleep(0)
    assert not task.done()
    may_end.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert done == ["work"]
