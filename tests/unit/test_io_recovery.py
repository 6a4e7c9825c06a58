"""A guest that a disk's error paused: who resumes it, when, and who doesn't."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from migrator.errors import WrongStateError
from migrator.model import (
    DomainName,
    DomainState,
    DomainStatus,
    MigrationId,
    NodeName,
    OwnershipRecord,
    OwnershipState,
)
from node_agent import io_recovery
from node_agent.state.ownership import ownership_key
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


async def test_it_goes_on_once_an_older_store_is_put_right(world: World) -> None:
    """By that store the guest was another node's, or nobody's: nobody looked after it any more."""
    await world.a.domains.stop(WEB)
    await world.a.domains.start(WEB)
    newest = await world.a.ownership.read(WEB)
    assert newest is not None
    for state_then in (OwnershipState.RUNNING, OwnershipState.STOPPED):
        older = OwnershipRecord(domain=WEB, token=1, owner="b", state=state_then)
        await world.a.typed.put(ownership_key(WEB), older)
        world.a.host.fail_disk(WEB)

        async def held_up() -> bool:
            reason = (await world.a.domains.statuses())[0].reason or ""
            return "not resumed yet" in reason

        await until(held_up)
        await asyncio.sleep(0.2)
        assert await state(world) is DomainState.IO_ERROR
        await world.a.typed.put(ownership_key(WEB), newest)
        await until(lambda: runs(world))


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
    trouble = world.a.domains._io_recovery._trouble(DomainName("x"))
    assert [trouble.next_pause_s() for _ in range(5)] == [0.01, 0.02, 0.04, 0.05, 0.05]


async def test_a_pool_that_stays_full_doesnt_fill_the_event_log(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It pauses the guest again and again, for days perhaps; that is told once, and its end."""
    monkeypatch.setattr(io_recovery, "STEADY_S", 60.0)  # However late the next error is heard.
    resume, left = world.a.hypervisor.resume, 8

    async def resume_and_fail(domain: DomainName) -> float:
        nonlocal left
        at_s = await resume(domain)
        left -= 1
        if left > 0:
            asyncio.get_running_loop().call_later(0.01, world.a.host.fail_disk, domain)
        else:
            monkeypatch.setattr(io_recovery, "STEADY_S", 0.05)
        return at_s

    monkeypatch.setattr(world.a.hypervisor, "resume", resume_and_fail)
    world.a.host.fail_disk(WEB)

    async def told_of_the_end() -> bool:
        return "goes on after" in (await world.a.events.read())[-1].message

    await until(told_of_the_end)
    assert await state(world) is DomainState.RUNNING
    kinds = [event.kind for event in await world.a.events.read()]
    assert kinds[-4:] == ["domain-io-error", "domain-resumed", "domain-io-error", "domain-resumed"]
    assert kinds.count("domain-io-error") == 2
    assert "8 resumes" in (await world.a.events.read())[-1].message


async def test_it_is_shown_why_it_isnt_resumed_yet(world: World) -> None:
    faults: PoolFaults = world.a.pool.faults
    faults.lost = True
    world.a.host.fail_disk(WEB)

    async def shown() -> bool:
        reason = (await world.a.domains.statuses())[0].reason or ""
        return "not resumed yet: pool default is lost" in reason

    await until(shown)
    faults.lost = False
    await until(lambda: runs(world))
    assert (await world.a.domains.statuses())[0].reason is None


async def test_it_stays_one_trouble_however_long_the_storage_is_away(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a resume that didn't last: its pauses don't begin anew, nor does what is told."""
    monkeypatch.setattr(io_recovery, "STEADY_S", 0.05)
    resume = world.a.hypervisor.resume

    async def resume_and_lose(domain: DomainName) -> float:
        at_s = await resume(domain)
        world.a.pool.faults.lost = True
        world.a.host.fail_disk(domain)
        return at_s

    monkeypatch.setattr(world.a.hypervisor, "resume", resume_and_lose)
    world.a.host.fail_disk(WEB)
    recovery = world.a.domains._io_recovery

    async def held_up() -> bool:
        return "is lost" in recovery.remark(WEB)

    await until(held_up)
    trouble = recovery._troubles[WEB]

    async def pauses_longest() -> bool:
        return trouble.pause_s == io_recovery.LONGEST_PAUSE_S

    await until(pauses_longest)
    await asyncio.sleep(0.3)
    assert recovery._troubles[WEB] is trouble
    assert trouble.pause_s == io_recovery.LONGEST_PAUSE_S
    monkeypatch.setattr(world.a.hypervisor, "resume", resume)
    world.a.pool.faults.lost = False
    await until(lambda: runs(world))


async def test_a_guest_whose_storage_hangs_can_be_stopped_at_once(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It used to wait until the storage was given up, 15 s and more, and was then refused."""
    asked, hangs = asyncio.Event(), asyncio.Event()

    async def hang(_: object) -> None:
        asked.set()
        await hangs.wait()

    monkeypatch.setattr(world.a.pool, "verify", hang)
    world.a.host.fail_disk(WEB)
    await asyncio.wait_for(asked.wait(), 10)
    async with asyncio.timeout(5):
        await world.a.domains.stop(WEB, timeout_s=0.0)
    assert await state(world) is DomainState.STOPPED
    hangs.set()
