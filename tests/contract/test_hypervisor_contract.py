"""The contract of HypervisorDriver, on the simulated driver and on real QEMU."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest

from migrator.errors import HypervisorError, NotFoundError, NotResumedError
from migrator.model import PAGE_SIZE_BYTES, DomainState
from migrator.ports import AbortOutcome, DomainEventKind
from tests.contract.hypervisor_worlds import (
    KINDS,
    MEMORY_BYTES,
    SOON_S,
    VM,
    World,
    open_world,
)


@pytest.fixture(params=KINDS)
async def world(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[World]:
    async with open_world(request.param, tmp_path) as made:
        yield made


async def test_capabilities(world: World) -> None:
    found = await world.a.driver.capabilities()
    assert found.driver == world.a.driver.name
    assert {"q35", "pc-q35-7.2"} <= set(found.machine_types)
    assert "qemu64" in found.cpu_models
    assert found.paged_engine, found.paged_engine_reason


async def test_what_a_cpu_model_lacks_is_told_of_the_host_as_of_a_guest(world: World) -> None:
    """Emulated, Haswell lacks some features, wherever this runs."""
    driver, model = world.a.driver, "Haswell,-pcid,+avx512f"
    launch = world.launch(7)
    spec = msgspec.structs.replace(launch.spec, cpu_model=model)
    await driver.start(msgspec.structs.replace(launch, spec=spec))
    of_host, of_guest = await driver.cpu_lacks(model), await driver.cpu_lacks(model, VM)
    if not world.real:
        assert (of_host, of_guest) == (None, None)
        return
    assert of_host is not None and of_guest is not None
    assert set(of_host) == set(of_guest)
    assert {"x2apic", "avx512f"} <= set(of_host)
    assert "pcid" not in of_host and "pcid" in (await driver.cpu_lacks("Haswell") or ())
    assert await driver.cpu_lacks("zork") is None


async def test_start(world: World) -> None:
    await world.a.driver.start(world.launch(7))
    await world.a.wait(DomainEventKind.RESUMED)
    status = await world.a.driver.inspect(VM)
    assert status.state is DomainState.RUNNING
    assert status.pid is not None
    assert await world.a.driver.launched(VM) == world.launch().spec
    assert await world.a.driver.launched_all() == [world.launch().spec]
    assert [entry.name for entry in await world.a.driver.list_domains()] == [VM]
    with pytest.raises(HypervisorError):
        await world.a.driver.start(world.launch(8))
    assert await world.a.state() is DomainState.RUNNING


async def test_a_domain_that_is_not_here(world: World) -> None:
    driver = world.a.driver
    assert await world.a.state() is DomainState.STOPPED
    assert await driver.launched(VM) is None
    assert await driver.launched_all() == []
    assert await driver.abort_switchover(VM) is AbortOutcome.GONE
    await driver.destroy(VM)
    for call in (driver.pause, driver.resume, driver.reset, driver.memory):
        with pytest.raises(NotFoundError):
            await call(VM)
    with pytest.raises(NotFoundError):
        await driver.stop(VM, timeout_s=1)


async def test_pause_and_resume_are_idempotent(world: World) -> None:
    await world.a.driver.start(world.launch())
    before = time.time()
    for _ in range(2):
        await world.a.driver.pause(VM)
        assert await world.a.state() is DomainState.PAUSED
    paused = await world.a.wait(DomainEventKind.PAUSED)
    assert before - 0.01 <= paused.at_s <= time.time() + 0.01
    ran_at_s = await world.a.driver.resume(VM)
    assert paused.at_s <= ran_at_s <= time.time() + 0.01
    await world.a.driver.resume(VM)
    assert await world.a.state() is DomainState.RUNNING


async def test_reset(world: World) -> None:
    await world.a.driver.start(world.launch())
    await world.a.driver.reset(VM)
    assert await world.a.state() is DomainState.RUNNING
    await world.a.driver.pause(VM)
    await world.a.driver.reset(VM)
    assert await world.a.state() is DomainState.PAUSED


async def test_stop_by_force(world: World) -> None:
    world.ignore_power_button(world.a)
    await world.a.driver.start(world.launch())
    assert not await world.a.driver.stop(VM, timeout_s=0.3)
    assert await world.a.state() is DomainState.STOPPED
    assert "force" in (await world.a.wait(DomainEventKind.EXITED)).detail


async def test_destroy_is_idempotent(world: World) -> None:
    await world.a.driver.start(world.launch())
    for _ in range(2):
        await world.a.driver.destroy(VM)
        assert await world.a.state() is DomainState.STOPPED
    await world.a.wait(DomainEventKind.EXITED)
    assert await world.reopen("a") == []
    await world.a.driver.start(world.launch(2))


async def test_a_process_that_ends_by_itself_is_noticed(world: World) -> None:
    await world.a.driver.start(world.launch())
    await world.kill(world.a)
    event = await world.a.wait(DomainEventKind.EXITED)
    assert "signal 9" in event.detail
    assert await world.a.state() is DomainState.STOPPED
    await world.a.driver.start(world.launch(2))


async def test_a_crash_is_known_to_the_next_agent_until_the_domain_is_dealt_with(
    world: World,
) -> None:
    await world.a.driver.start(world.launch())
    await world.kill(world.a)
    assert (await world.a.wait(DomainEventKind.EXITED)).crashed
    assert list(world.a.driver.crashed()) == [VM]
    assert await world.reopen("a") == []  # It died before it could do anything about it.
    assert list(world.a.driver.crashed()) == [VM]
    await world.a.driver.destroy(VM)
    assert list(world.a.driver.crashed()) == [VM]
    await world.a.driver.forget_crash(VM)
    assert not world.a.driver.crashed()
    await world.reopen("a")
    assert not world.a.driver.crashed()


async def test_a_launch_ends_what_is_known_of_a_crash(world: World) -> None:
    await world.a.driver.start(world.launch())
    await world.kill(world.a)
    await world.a.wait(DomainEventKind.EXITED)
    await world.a.driver.start(world.launch(2))
    assert not world.a.driver.crashed()


async def test_an_end_that_was_asked_for_is_no_crash(world: World) -> None:
    await world.a.driver.start(world.launch())
    await world.a.driver.destroy(VM)
    await world.a.driver.start(world.launch(2))
    world.ignore_power_button(world.a)
    await world.a.driver.stop(VM, timeout_s=0.2)
    assert not [event for event in world.a.events if event.crashed]
    assert not world.a.driver.crashed()
    await world.reopen("a")
    assert not world.a.driver.crashed()


@pytest.mark.parametrize("ask", ["inspect", "list"])
async def test_who_hears_that_it_is_stopped_has_heard_how_it_ended(world: World, ask: str) -> None:
    """Else a crash is taken for a power-off, and nobody starts the domain again."""
    await world.a.driver.start(world.launch())

    async def stopped() -> bool:
        if ask == "inspect":
            return await world.a.state() is DomainState.STOPPED
        found = {each.name: each.state for each in await world.a.driver.list_domains()}
        return found.get(VM, DomainState.STOPPED) is DomainState.STOPPED

    await world.kill(world.a)
    async with asyncio.timeout(SOON_S):
        while not await stopped():
            pass  # As often as can be: it is about a moment.
    assert world.a.kinds()[-1] is DomainEventKind.EXITED


@pytest.mark.parametrize("state", [DomainState.RUNNING, DomainState.PAUSED, DomainState.INCOMING])
async def test_adoption(world: World, state: DomainState) -> None:
    if state is DomainState.INCOMING:
        await world.a.driver.start_incoming(world.launch())
    else:
        await world.a.driver.start(world.launch())
    if state is DomainState.PAUSED:
        await world.a.driver.pause(VM)
    before = await world.a.driver.inspect(VM)
    assert await world.reopen("a") == [VM]
    after = await world.a.driver.inspect(VM)
    assert (after.state, after.pid) == (state, before.pid)
    assert await world.a.driver.launched(VM) == world.launch().spec
    if state is not DomainState.INCOMING:
        await world.a.driver.pause(VM)
        await world.a.driver.resume(VM)
        await world.a.wait(DomainEventKind.RESUMED)
    await world.a.driver.destroy(VM)
    await world.a.wait(DomainEventKind.EXITED)


async def test_memory(world: World) -> None:
    await world.a.driver.start(world.launch())
    await world.reopen("a")
    memory = await world.a.driver.memory(VM)
    try:
        (region,) = memory.regions
        assert region.size_bytes == MEMORY_BYTES
        assert region.page_size_bytes == PAGE_SIZE_BYTES
        assert sum(mapping.length_bytes for mapping in region.mappings) == MEMORY_BYTES
        assert os.fstat(region.fd).st_size == MEMORY_BYTES
        assert all(os.fstat(fd) for fd in memory.fds)
    finally:
        memory.close()


async def test_handoff_and_back(world: World) -> None:
    await world.a.driver.start(world.launch())
    await world.switch_over(world.a, world.b)
    kinds = world.a.kinds()
    assert kinds.index(DomainEventKind.PAUSED) < kinds.index(DomainEventKind.PRE_SWITCHOVER)
    assert await world.a.state() is DomainState.POSTMIGRATE
    assert await world.b.state() is DomainState.LOADED
    await world.b.driver.resume(VM)
    assert await world.b.state() is DomainState.RUNNING
    await world.a.driver.destroy(VM)
    await world.b.driver.pause(VM)
    assert await world.b.state() is DomainState.PAUSED, "it ran: it isn't a destination any more"
    await world.b.driver.resume(VM)
    assert await world.b.driver.abort_switchover(VM) is AbortOutcome.RESUMED
    await world.switch_over(world.b, world.a)
    await world.a.driver.resume(VM)
    assert await world.a.state() is DomainState.RUNNING


async def test_rollback_after_sent_and_a_second_migration(world: World) -> None:
    await world.a.driver.start(world.launch())
    for _ in range(2):
        await world.switch_over(world.a, world.b)
        assert await world.a.driver.abort_switchover(VM) is AbortOutcome.SENT
        assert await world.a.state() is DomainState.POSTMIGRATE
        await world.b.driver.destroy(VM)
        await world.a.driver.resume(VM)
        assert await world.a.state() is DomainState.RUNNING
        assert await world.a.driver.abort_switchover(VM) is AbortOutcome.RESUMED
    await world.switch_over(world.a, world.b)
    await world.b.driver.resume(VM)
    assert await world.b.state() is DomainState.RUNNING


async def test_abort_where_nothing_was_begun(world: World) -> None:
    await world.a.driver.start(world.launch())
    assert await world.a.driver.abort_switchover(VM) is AbortOutcome.RESUMED
    await world.a.driver.prepare_switchover(VM)
    assert await world.a.driver.abort_switchover(VM) is AbortOutcome.RESUMED
    assert await world.a.state() is DomainState.RUNNING


async def test_abort_in_pre_switchover(world: World) -> None:
    await world.a.driver.start(world.launch())
    for _ in range(2):
        await world.begin(world.a, world.b)
        assert await world.a.state() is DomainState.PRE_SWITCHOVER
        for _ in range(2):
            assert await world.a.driver.abort_switchover(VM) is AbortOutcome.RESUMED
            assert await world.a.state() is DomainState.RUNNING
        await world.a.wait(DomainEventKind.MIGRATION_FAILED)
        await world.b.driver.destroy(VM)
    await world.switch_over(world.a, world.b)


async def test_abort_right_after_continue_has_one_of_two_outcomes(world: World) -> None:
    await world.a.driver.start(world.launch())
    await world.begin(world.a, world.b)
    await world.a.driver.continue_switchover(VM)
    outcome = await world.a.driver.abort_switchover(VM)
    expected = {
        AbortOutcome.SENT: DomainState.POSTMIGRATE,
        AbortOutcome.RESUMED: DomainState.RUNNING,
    }
    assert await world.a.state() is expected[outcome]


async def test_the_destination_dies_in_pre_switchover(world: World) -> None:
    await world.a.driver.start(world.launch())
    await world.begin(world.a, world.b)
    await world.kill(world.b)
    await world.b.wait(DomainEventKind.EXITED)
    await world.a.driver.continue_switchover(VM)
    await world.a.wait(DomainEventKind.RESUMED)
    assert await world.a.state() is DomainState.RUNNING
    assert await world.a.driver.abort_switchover(VM) is AbortOutcome.RESUMED
    await world.switch_over(world.a, world.b)


async def test_the_source_dies_in_pre_switchover(world: World) -> None:
    await world.a.driver.start(world.launch())
    await world.begin(world.a, world.b)
    await world.kill(world.a)
    await world.a.wait(DomainEventKind.EXITED)
    assert await world.a.driver.abort_switchover(VM) is AbortOutcome.GONE
    assert await world.b.state() in (DomainState.INCOMING, DomainState.STOPPED)


async def test_a_channel_that_leads_nowhere_leaves_the_source_running(world: World) -> None:
    await world.a.driver.start(world.launch())
    await world.a.driver.begin_switchover(VM, world.folder / "nowhere")
    await world.a.wait(DomainEventKind.MIGRATION_FAILED)
    assert await world.a.driver.abort_switchover(VM) is AbortOutcome.RESUMED
    assert await world.a.state() is DomainState.RUNNING


async def test_a_paused_domain_moves_paused(world: World) -> None:
    await world.a.driver.start(world.launch())
    await world.a.driver.pause(VM)
    await world.begin(world.a, world.b)
    assert DomainEventKind.PAUSED in world.a.kinds()
    assert await world.a.driver.abort_switchover(VM) is AbortOutcome.RESUMED
    assert await world.a.state() is DomainState.PAUSED
    await world.b.driver.destroy(VM)
    await world.a.driver.resume(VM)  # QEMU refuses to migrate it again without, see switchover.py.
    await world.a.driver.pause(VM)
    await world.switch_over(world.a, world.b)
    assert await world.a.state() is DomainState.POSTMIGRATE
    assert await world.b.state() is DomainState.LOADED


async def test_a_destination_that_is_not_loaded_cannot_be_resumed(world: World) -> None:
    await world.a.driver.start(world.launch())
    await world.b.driver.start_incoming(world.launch(2))
    with pytest.raises(HypervisorError, match="incoming"):
        await world.b.driver.resume(VM)
    await world.b.driver.destroy(VM)
    await world.switch_over(world.a, world.b)
    assert await world.b.state() is DomainState.LOADED, "cont must not have been remembered"


async def test_a_destination_that_died_right_before_its_resume_is_certain_not_to_have_run(
    world: World,
) -> None:
    """Nobody has noticed yet that it died: the resume itself finds out."""
    await world.a.driver.start(world.launch())
    await world.switch_over(world.a, world.b)
    await world.kill(world.b)
    with pytest.raises((NotResumedError, NotFoundError)):
        await world.b.driver.resume(VM)
    await world.b.wait(DomainEventKind.EXITED)
    with pytest.raises((NotResumedError, NotFoundError)):
        await world.b.driver.resume(VM)
    await world.a.driver.resume(VM)
    assert await world.a.state() is DomainState.RUNNING


@pytest.mark.parametrize("sent", [False, True])
async def test_the_source_agent_restarts_in_a_switchover(world: World, sent: bool) -> None:
    await world.a.driver.start(world.launch())
    await (world.switch_over if sent else world.begin)(world.a, world.b)
    assert await world.reopen("a") == [VM]
    state = DomainState.POSTMIGRATE if sent else DomainState.PRE_SWITCHOVER
    assert await world.a.state() is state
    outcome = AbortOutcome.SENT if sent else AbortOutcome.RESUMED
    assert await world.a.driver.abort_switchover(VM) is outcome
    await world.b.driver.destroy(VM)
    await world.a.driver.resume(VM)
    assert await world.a.state() is DomainState.RUNNING
    await world.switch_over(world.a, world.b)


@pytest.mark.parametrize("ran", [False, True])
async def test_the_destination_agent_restarts_after_loading(world: World, ran: bool) -> None:
    await world.a.driver.start(world.launch())
    await world.switch_over(world.a, world.b)
    if ran:
        await world.b.driver.resume(VM)
    assert await world.reopen("b") == [VM]
    assert await world.b.state() is (DomainState.RUNNING if ran else DomainState.LOADED)
    await world.b.driver.resume(VM)
    await world.b.driver.pause(VM)
    assert await world.b.state() is DomainState.PAUSED


async def test_an_unsubscribed_callback_hears_nothing(world: World) -> None:
    heard: list[DomainEventKind] = []
    unsubscribe = world.a.driver.subscribe(lambda event: heard.append(event.kind))
    await world.a.driver.start(world.launch())
    await world.a.wait(DomainEventKind.RESUMED)
    assert heard == [DomainEventKind.RESUMED]
    unsubscribe()
    unsubscribe()
    await world.a.driver.pause(VM)
    await world.a.wait(DomainEventKind.PAUSED)
    assert heard == [DomainEventKind.RESUMED]
