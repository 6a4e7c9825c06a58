"""A guest that a disk's error paused: who resumes it, when, and who doesn't."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from migrator.errors import WrongStateError
from migrator.model import DomainName, DomainState, DomainStatus, MigrationId, NodeName
from node_agent import io_recovery
from storage.simulated import PoolFaults
from tests.unit.agent_world import World, open_world, spec_of

WEB = DomainName("web")


@pytest.fixture
async def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    monkeypatch.setattr(io_recovery, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(io_recovery, "LONGEST_PAUSE_S", 0.05)
    async with open_world(tmp_path) as opened:
        await opened.a.domains.define(spec_of())
        await opened.a.domains.start(WEB)
        yield opened


async def state(world: World) -> DomainState:
    return (await world.a.domains.status(WEB)).state


async def until(check: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(30):
        while not await check():  # noqa: ASYNC110 - Two services' doings; neither has an event.
            await asyncio.sleep(0.01)


async def runs(world: World) -> bool:
    return await state(world) is DomainState.RUNNING


async def test_it_goes_on_by_itself_and_says_so(world: World) -> None:
    world.a.host.fail_disk(WEB)
    assert await state(world) is DomainState.IO_ERROR
    await until(lambda: runs(world))
    events = [event.kind for event in await world.a.events.read()]
    assert events[-2:] == ["domain-io-error", "domain-resumed"]


async def test_again_and_again(world: World) -> None:
    for _ in range(5):
        world.a.host.fail_disk(WEB)
        await until(lambda: runs(world))


async def test_an_error_right_after_the_resume_is_not_missed(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    resume, left = world.a.hypervisor.resume, 3

    async def resume_and_fail(domain: DomainName) -> float:
        nonlocal left
        at_s = await resume(domain)
        if left:
            left -= 1
            world.a.host.fail_disk(domain)
        return at_s

    monkeypatch.setattr(world.a.hypervisor, "resume", resume_and_fail)
    world.a.host.fail_disk(WEB)
    await until(lambda: runs(world))
    assert left == 0


async def test_not_before_the_storage_answers(world: World) -> None:
    faults: PoolFaults = world.a.pool.faults
    faults.lost = True
    world.a.host.fail_disk(WEB)
    await asyncio.sleep(0.2)
    assert await state(world) is DomainState.IO_ERROR
    faults.lost = False
    await until(lambda: runs(world))


async def test_not_under_a_migration_but_after_it(world: World) -> None:
    migration = MigrationId("m-1")
    await world.a.domains.locks.claim_for_migration(WEB, migration)
    world.a.host.fail_disk(WEB)
    await asyncio.sleep(0.2)
    assert await state(world) is DomainState.IO_ERROR
    world.a.domains.locks.release_from_migration(WEB, migration)
    await until(lambda: runs(world))


async def test_not_a_copy_that_lost_its_domain(world: World) -> None:
    """A fenced writer has the same error: the record says whose it is."""
    owned = await world.a.ownership.read(WEB)
    assert owned is not None
    assert await world.a.ownership.compare_and_set(owned, owned.passed_to(NodeName("b")))
    world.a.host.fail_disk(WEB)
    await asyncio.sleep(0.2)
    assert await state(world) is not DomainState.RUNNING


async def test_what_the_last_agent_left_paused_is_taken_up(world: World) -> None:
    await world.a.domains.close()
    world.a.host.fail_disk(WEB)
    await world.a.domains.open([WEB])
    await until(lambda: runs(world))


@pytest.mark.parametrize("restarted", [False, True])
async def test_a_hypervisor_that_is_silent_meanwhile_is_asked_again(
    world: World, monkeypatch: pytest.MonkeyPatch, restarted: bool
) -> None:
    """It may wait for the same storage, and reports nothing anew."""
    inspect, asked, silent = world.a.hypervisor.inspect, asyncio.Event(), True

    async def say_nothing(domain: DomainName) -> DomainStatus:
        if not silent:
            return await inspect(domain)
        asked.set()
        return DomainStatus(name=domain, state=DomainState.UNKNOWN, reason="no answer in 2 s")

    monkeypatch.setattr(world.a.hypervisor, "inspect", say_nothing)
    if restarted:
        await world.a.domains.close()
    world.a.host.fail_disk(WEB)
    if restarted:
        await world.a.domains.open([WEB])
    await asyncio.wait_for(asked.wait(), 10)
    await asyncio.sleep(0.05)
    silent = False
    await until(lambda: runs(world))


async def test_a_pause_that_could_not_last_is_refused(world: World) -> None:
    faults: PoolFaults = world.a.pool.faults
    faults.lost = True
    world.a.host.fail_disk(WEB)
    with pytest.raises(WrongStateError, match="stop it if it must not"):
        await world.a.domains.pause(WEB)
    faults.lost = False
    await until(lambda: runs(world))
    await world.a.domains.pause(WEB)
    assert await state(world) is DomainState.PAUSED


async def test_it_pauses_longer_and_longer(world: World) -> None:
    recovery = world.a.domains._io_recovery
    pauses = [recovery._next_pause_s(DomainName("x")) for _ in range(5)]
    assert pauses == [0.01, 0.02, 0.04, 0.05, 0.05]
