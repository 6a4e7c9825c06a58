"""Starts and takeovers by a store that was restored from an older copy, for good."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from migrator.errors import ConflictError, RefusedError
from migrator.model import (
    DiskFormat,
    DomainState,
    FencingToken,
    OwnershipRecord,
    OwnershipState,
    VolumeName,
)
from node_agent import domain_restart, older_store
from node_agent.events import EventKind
from node_agent.state.ownership import ownership_key
from tests.unit.agent_world import SimulatedNode, World, open_world, spec_of
from tests.unit.node_life import RUNNING, STOPPED, WEB, agent_starts, eventually, host_dies

ROOT = VolumeName("root")


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    """`web` ran on `a` under token 1, and runs on `b` under 2."""
    async with open_world(tmp_path) as opened:
        await opened.a.domains.define(spec_of())
        await opened.a.domains.start(WEB)
        await opened.a.domains.stop(WEB)
        await opened.b.domains.start(WEB)
        yield opened


async def restore(world: World, state: OwnershipState | None = RUNNING) -> None:
    """As `a` had it; None: as it was before the domain's first start."""
    if state is None:
        owned = await world.b.ownership.read(WEB)
        assert owned is not None
        await world.b.ownership.remove(owned)
        return
    older = OwnershipRecord(domain=WEB, token=1, owner="a", state=state)
    await world.a.typed.put(ownership_key(WEB), older)


async def owned(world: World) -> tuple[int, str, OwnershipState] | None:
    record = await world.b.ownership.read(WEB)
    return None if record is None else (record.token, record.owner, record.state)


async def runs(node: SimulatedNode) -> bool:
    return (await node.domains.status(WEB)).state is DomainState.RUNNING


async def silence(node: SimulatedNode, world: World) -> None:
    """It is up, and doesn't answer."""
    await node.registry.close()
    await node.hub.close()
    world.a.registry._unreachable_after_s = -1.0  # However young its last word is.


@pytest.mark.parametrize("enforces", [False, True])
@pytest.mark.parametrize("state", [RUNNING, STOPPED, None])
async def test_what_runs_elsewhere_is_not_started(
    world: World, state: OwnershipState | None, enforces: bool
) -> None:
    """It was: beside the guest that ran on, or, behind a fence, in its place."""
    world.volumes.enforces = enforces
    await restore(world, state)
    with pytest.raises(ConflictError, match=r"b has it, .* domain takeover web --to b` makes"):
        await world.a.domains.start(WEB)
    assert await runs(world.b)
    assert not await runs(world.a)
    world.b.pool.write(ROOT, FencingToken(2))
    assert not world.volumes.stale_writes()

    async def told() -> bool:
        return any(each.kind == EventKind.STORE_BEHIND for each in await world.a.events.read())

    await eventually(told)


async def test_nor_by_an_agent_whose_host_was_rebooted(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By that record it was running there, and was lost."""
    monkeypatch.setattr(domain_restart, "PAUSE_S", 0.01)
    await restore(world)
    await host_dies(world.a)
    await agent_starts(world.a, "boot-2")

    async def told() -> bool:
        notes = (await world.a.records.get(WEB)).history
        return any("could not be started again yet" in note.text for note in notes)

    await eventually(told)
    assert await runs(world.b)
    assert not await runs(world.a)
    await world.b.domains.ownership._hypervisor.destroy(WEB)  # It was powered off from within.

    async def starts() -> bool:
        return await owned(world) == (3, "a", RUNNING) and await runs(world.a)

    await eventually(starts)


@pytest.mark.parametrize("state", [RUNNING, STOPPED, None])
async def test_the_store_is_told_what_is(world: World, state: OwnershipState | None) -> None:
    await restore(world, state)
    guest = (await world.b.domains.status(WEB)).pid
    await world.b.takeover.take_over(WEB, user="eve")
    assert await owned(world) == (2, "b", RUNNING)
    assert (await world.b.domains.status(WEB)).pid == guest
    (note,) = (await world.b.records.get(WEB)).history
    assert note.user == "eve"
    assert note.text.startswith("it runs on b under token 2, which the store, with ")
    await world.b.domains.ownership._sweep_once()
    await world.a.domains.ownership._sweep_once()
    assert await runs(world.b)
    with pytest.raises(ConflictError, match="runs on b"):
        await world.a.domains.start(WEB)
    await world.b.domains.stop(WEB)
    await world.a.domains.start(WEB)
    assert await owned(world) == (3, "a", RUNNING)


async def test_a_guest_of_which_there_is_no_record_is_told_of(world: World) -> None:
    """Its domain was defined after the snapshot: only the agent's log said so."""
    await restore(world, None)
    await world.b.domains.ownership.reconcile([WEB])
    await world.b.domains.ownership.reconcile([WEB])
    assert await runs(world.b)

    async def told() -> bool:
        messages = [
            e.message for e in await world.a.events.read() if e.kind == EventKind.STORE_BEHIND
        ]
        return len(messages) == 1 and "the store has no record of it" in messages[0]

    await eventually(told)


async def test_what_the_store_knows_by_now_needs_no_takeover(world: World) -> None:
    """A reader of the event was told to stop a guest that runs, and to start it."""
    with pytest.raises(RefusedError, match="it is b's own, and running there, as the store knows"):
        await world.b.takeover.take_over(WEB)
    assert await runs(world.b)


async def test_a_node_that_may_run_it_and_cannot_be_shut_out_is_waited_for(world: World) -> None:
    world.volumes.enforces = False
    await restore(world, STOPPED)
    await silence(world.b, world)
    with pytest.raises(ConflictError, match="b may run it, which can't be asked"):
        await world.a.domains.start(WEB)
    assert await owned(world) == (1, "a", STOPPED)


@pytest.mark.parametrize("anew", [False, True])
async def test_a_silent_node_holds_nobody_up_where_it_did_not_before(
    world: World, anew: bool
) -> None:
    """It is shut out; or there is no record, as of a domain that was just defined anew."""
    world.volumes.enforces = not anew
    await restore(world, None if anew else STOPPED)
    await silence(world.b, world)
    await world.a.domains.start(WEB)
    assert await owned(world) == (3, "a", RUNNING)


async def test_nor_does_a_copy_that_its_disks_have_stopped(world: World) -> None:
    """It was taken over, it may be, and shut out: nobody could power it off from within."""
    await restore(world, STOPPED)
    await world.b.domains.close()
    world.b.host.fail_disk(WEB)
    await world.a.domains.start(WEB)
    assert await owned(world) == (3, "a", RUNNING)
    await world.b.domains.ownership.reconcile([WEB])
    assert (await world.b.domains.status(WEB)).state is DomainState.STOPPED


async def test_a_token_that_is_behind_on_its_own_node_is_put_right(world: World) -> None:
    """The next handoff would win a token that the volumes know already: no fence."""
    await world.b.domains.stop(WEB)
    await world.b.domains.start(WEB)
    older = OwnershipRecord(domain=WEB, token=2, owner="b", state=RUNNING)
    await world.b.typed.put(ownership_key(WEB), older)
    ownership = world.b.domains.ownership
    with pytest.raises(ConflictError, match="b puts that right within seconds"):
        await ownership.older.refuse_move(WEB, older)
    await ownership._sweep_once()
    assert await owned(world) == (3, "b", RUNNING)
    caught_up = await ownership.owned_here(WEB)
    await ownership.older.refuse_move(WEB, caught_up)
    assert await runs(world.b)


async def won_back(world: World) -> None:
    """`a` had won a handoff, and gave it back; the snapshot is of between the two."""
    await world.b.pool.fence(ROOT, FencingToken(4))
    won = OwnershipRecord(domain=WEB, token=3, owner="a", state=RUNNING)
    await world.b.typed.put(ownership_key(WEB), won)


async def test_what_was_won_back_after_the_snapshot_is_not_ended(world: World) -> None:
    """By its own token the guest is older than that record."""
    await won_back(world)
    ownership = world.b.domains.ownership
    await ownership._sweep_once()
    await ownership.reconcile([WEB])
    assert await runs(world.b)

    async def told() -> bool:
        messages = [each.message for each in await world.b.events.read()]
        return any("b, its volumes were fenced under token 4, and the store" in m for m in messages)

    await eventually(told)


async def test_a_stale_copy_does_not_outlive_a_storage_that_hangs(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What its volumes know can't be looked at: the record is believed, as ever."""
    await won_back(world)
    monkeypatch.setattr(older_store, "FENCE_LOOK_S", 0.05)

    async def hang(_: object) -> FencingToken:
        await asyncio.Event().wait()
        raise AssertionError("unreachable")

    monkeypatch.setattr(world.b.domains.ownership.older._launches, "newest_fence", hang)
    await world.b.domains.ownership._sweep_once()
    assert not await runs(world.b)


async def test_no_guest_is_kept_beside_another_or_one_that_may_be(world: World) -> None:
    await world.b.domains.stop(WEB)
    await world.a.domains.start(WEB)
    world.b.host.guests.clear()
    await restore(world, STOPPED)
    await silence(world.b, world)
    with pytest.raises(RefusedError, match="b can't be asked whether it has a guest of it, too"):
        await world.a.takeover.take_over(WEB)
    assert await runs(world.a)


async def test_a_stale_copy_that_the_store_takes_for_the_guest_is_stopped_first(
    world: World,
) -> None:
    """`b` was silent, and was taken over; then came the restore, and then `b` came back."""
    await world.b.domains.close()
    timeout_s, world.a.registry._unreachable_after_s = world.a.registry._unreachable_after_s, -1.0
    await world.a.takeover.take_over(WEB)
    world.a.registry._unreachable_after_s = timeout_s
    older = OwnershipRecord(domain=WEB, token=2, owner="b", state=RUNNING)
    await world.a.typed.put(ownership_key(WEB), older)
    with pytest.raises(RefusedError, match="b has a guest of it, too: `ferry domain stop web`"):
        await world.a.takeover.take_over(WEB)
    await world.b.domains.stop(WEB)
    await world.a.takeover.take_over(WEB)
    assert await owned(world) == (4, "a", RUNNING)
    assert await runs(world.a)
    assert not await runs(world.b)


async def test_no_guest_is_kept_that_another_may_have_come_after(world: World) -> None:
    """Or whose volumes are others by now: the domain was deleted, and defined anew."""
    await restore(world)
    await world.b.pool.fence(ROOT, FencingToken(4))
    with pytest.raises(RefusedError, match="another copy of it may have run since"):
        await world.b.takeover.take_over(WEB)
    world.volumes.volumes.clear()
    await world.b.pool.create(ROOT, capacity_bytes=1024**2, format=DiskFormat.RAW)
    with pytest.raises(RefusedError, match="they are others by now"):
        await world.b.takeover.take_over(WEB)
    assert await owned(world) == (1, "a", RUNNING)
    assert await runs(world.b)


async def test_a_takeover_by_such_a_record_ends_no_guest(world: World) -> None:
    """`c` is gone, and had it by that record; `b` is the one that runs it."""
    older = OwnershipRecord(domain=WEB, token=1, owner="c", state=RUNNING)
    await world.a.typed.put(ownership_key(WEB), older)
    with pytest.raises(ConflictError, match="b has it"):
        await world.a.takeover.take_over(WEB)
    assert await runs(world.b)
