"""A host that goes down in order: its guests before it, and again with its next agent."""

from __future__ import annotations

import asyncio
import time

import msgspec
import pytest

from migrator.errors import NotFoundError, RefusedError
from migrator.model import DomainName, MigrationId, OwnershipState
from node_agent import domain_restart, host_shutdown
from node_agent.domain_restart import GIVE_UP_S, TRIES
from node_agent.events import EventKind
from node_agent.host_shutdown import HostShutdown, without_agent
from node_agent.resources import GuestsEnded
from tests.unit.agent_world import SimulatedNode, World, spec_of
from tests.unit.node_life import (
    RUNNING,
    STOPPED,
    WEB,
    agent_dies,
    agent_starts,
    eventually,
    host_dies,
    record_of,
    runs_under,
    started,
    stays,
    told,
)

MIGRATION = MigrationId("m-1")
LIMIT_S = 5.0
SOON_S = 0.05


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(domain_restart, "PAUSE_S", 0.01)


class Shutdown:
    """That of a node's agent, and what it asked of migrations."""

    def __init__(self, node: SimulatedNode) -> None:
        self.node = node
        self.cancelled: list[tuple[str, str]] = []
        self.service = HostShutdown(
            node.name,
            hypervisor=node.hypervisor,
            domains=node.domains,
            cancel=self._cancel,
            events=node.events,
        )
        self.lets_go = True

    async def _cancel(self, migration: MigrationId, by: str) -> None:
        self.cancelled.append((migration, by))
        if not self.lets_go:
            raise NotFoundError("it is too late")
        self.node.domains.locks.release_from_migration(WEB, migration)

    async def run(self, limit_s: float = LIMIT_S) -> GuestsEnded:
        return await self.service.run(limit_s)


async def _many(node: SimulatedNode, priorities: dict[str, int]) -> None:
    for name, priority in priorities.items():
        spec = msgspec.structs.replace(spec_of(name, disks=[], nics=[]), priority=priority)
        await node.domains.define(spec)
        await node.domains.start(DomainName(name))


def _time_given(node: SimulatedNode) -> dict[str, float]:
    """To each guest that is asked to power off, in that order, s."""
    given_s: dict[str, float] = {}
    stop = node.hypervisor.stop

    async def seen(domain: DomainName, *, timeout_s: float) -> bool:
        given_s[domain] = timeout_s
        return await stop(domain, timeout_s=timeout_s)

    node.hypervisor.stop = seen  # type: ignore[method-assign]
    return given_s


# --- what becomes of the guests ----------------------------------------------------------------


async def test_guests_are_shut_down_and_start_again_with_the_host(world: World) -> None:
    before = await started(world.a)
    assert await Shutdown(world.a).run() == GuestsEnded(powered_off=(WEB,))
    record = await record_of(world.a)
    assert (record.token, record.state) == (before.token, STOPPED)
    assert world.a.restarts.notes.wanted[WEB].token == before.token
    await told(world.a, "it is to be started again: a was shut down")
    await host_dies(world.a)
    await agent_starts(world.a, "boot-2")
    await runs_under(world.a, before.token + 1)
    assert not world.a.restarts.notes.host_ends
    await told(world.a, "was started again on a: a was shut down")


async def test_nobody_is_alarmed_by_it(world: World) -> None:
    await started(world.a)
    await Shutdown(world.a).run()
    await told(world.a, "it is to be started again: a was shut down")
    kinds = [event.kind for event in await world.a.events.read()]
    assert EventKind.DOMAIN_LOST not in kinds
    assert EventKind.DOMAIN_STOPPED in kinds


async def test_it_is_noted_before_the_first_guest_is_asked(world: World) -> None:
    await started(world.a)
    world.a.host.faults.hanging.add("stop")
    ending = asyncio.create_task(Shutdown(world.a).run())

    async def noted() -> bool:
        return world.a.restarts.notes.host_ends

    await eventually(noted)
    assert (await record_of(world.a)).state is RUNNING
    world.a.host.faults.hanging.clear()
    world.a.host.faults.release()
    assert (await ending).powered_off == (WEB,)


async def test_one_that_does_not_go_is_ended_by_force_and_told_of(world: World) -> None:
    before = await started(world.a)
    world.a.host.faults.ignores_power_button = True
    assert await Shutdown(world.a).run(SOON_S) == GuestsEnded(forced=(WEB,))
    await told(world.a, "domain web was ended by force: it didn't power itself off")
    await host_dies(world.a)
    await agent_starts(world.a, "boot-2")
    await runs_under(world.a, before.token + 1)


async def test_where_no_time_is_left_they_are_ended_by_force(world: World) -> None:
    """They were left, as if they had come meanwhile."""
    await started(world.a)
    world.a.host.faults.ignores_power_button = True
    assert await Shutdown(world.a).run(0.0) == GuestsEnded(forced=(WEB,))


async def test_one_that_can_not_be_ended_is_left_and_holds_up_nobody(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_shutdown, "FORCE_S", 0.1)
    before = await started(world.a)
    world.a.host.faults.hanging.add("stop")
    ended = await Shutdown(world.a).run(SOON_S)
    assert [each.name for each in ended.left] == [WEB]
    world.a.host.faults.hanging.clear()
    world.a.host.faults.release()
    await host_dies(world.a)
    await agent_starts(world.a, "boot-2")
    await runs_under(world.a, before.token + 1)


async def test_what_fails_is_left_and_the_others_end(world: World) -> None:
    await _many(world.a, {"db": 0, "web": 0})
    world.a.host.faults.failing["stop"] = 1
    ended = await Shutdown(world.a).run()
    assert (len(ended.powered_off), len(ended.left)) == (1, 1)
    assert "stop failed" in ended.left[0].why


async def test_what_was_stopped_before_stays_stopped(world: World) -> None:
    before = await started(world.a)
    await world.a.domains.stop(WEB)
    assert await Shutdown(world.a).run() == GuestsEnded()
    await host_dies(world.a)
    await agent_starts(world.a, "boot-2")
    await stays(world.a, STOPPED, before.token)


async def test_what_is_being_stopped_stays_stopped(world: World) -> None:
    before = await started(world.a)
    world.a.host.faults.hanging.add("stop")
    stopping = asyncio.create_task(world.a.domains.stop(WEB))

    async def asked() -> bool:
        return world.a.restarts.notes.ending == {WEB: 1}

    await eventually(asked)
    ending = asyncio.create_task(Shutdown(world.a).run())
    await asyncio.sleep(0)
    world.a.host.faults.hanging.clear()
    world.a.host.faults.release()
    await stopping
    assert await ending == GuestsEnded()
    await host_dies(world.a)
    await agent_starts(world.a, "boot-2")
    await stays(world.a, STOPPED, before.token)


async def test_it_stays_stopped_where_restarts_are_switched_off(world: World) -> None:
    before = await started(world.a)
    await agent_dies(world.a)
    await agent_starts(world.a, restart=False)
    await Shutdown(world.a).run()
    await host_dies(world.a)
    await agent_starts(world.a, "boot-2", restart=False)
    await stays(world.a, STOPPED, before.token)


async def test_an_operator_may_call_its_start_off_or_start_it_elsewhere(world: World) -> None:
    before = await started(world.a)
    await Shutdown(world.a).run()
    await world.b.domains.start(WEB)
    await host_dies(world.a)
    await agent_starts(world.a, "boot-2")
    await stays(world.a, RUNNING, before.token + 1, "b")


async def test_a_stop_meanwhile_calls_its_start_off(world: World) -> None:
    before = await started(world.a)
    await Shutdown(world.a).run()
    await world.a.domains.stop(WEB)
    await host_dies(world.a)
    await agent_starts(world.a, "boot-2")
    await stays(world.a, STOPPED, before.token)


# --- in which order ----------------------------------------------------------------------------


async def test_the_most_important_are_asked_last(world: World) -> None:
    await _many(world.a, {"dns": 900, "web": 100, "db": 500, "mail": 100})
    given_s = _time_given(world.a)
    assert len((await Shutdown(world.a).run()).powered_off) == 4
    order = list(given_s)
    assert set(order[:2]) == {"web", "mail"}
    assert order[2:] == ["db", "dns"]


async def test_the_last_have_half_of_the_limit_whoever_is_still_there(world: World) -> None:
    await _many(world.a, {"web": 1, "db": 2, "dns": 3})
    world.a.host.faults.ignores_power_button = True
    given_s = _time_given(world.a)
    ended = await Shutdown(world.a).run(2.0)
    assert ended.forced == ("db", "dns", "web")
    assert given_s["web"] > given_s["db"] > given_s["dns"] > 0.1, "on a busy machine, too"


# --- meanwhile, and where it is called off -----------------------------------------------------


async def test_nothing_starts_or_comes_here_meanwhile(world: World) -> None:
    await started(world.a)
    await Shutdown(world.a).run()
    with pytest.raises(RefusedError, match="a is going down"):
        await world.a.domains.start(WEB)
    assert await world.a.domains.closed()
    await world.a.domains.ownership._sweep_once()
    assert WEB not in world.a.host.guests


async def test_the_next_agent_of_the_same_boot_starts_them(world: World) -> None:
    """The host didn't go down after all, or its kernel stayed (a soft reboot)."""
    before = await started(world.a)
    await Shutdown(world.a).run()
    await agent_dies(world.a)
    await agent_starts(world.a)
    await runs_under(world.a, before.token + 1)


@pytest.mark.parametrize("boot", ["boot-1", "boot-2"])
async def test_an_agent_that_dies_in_the_middle_loses_nothing(world: World, boot: str) -> None:
    """The guest heard the button, and ended unseen."""
    before = await started(world.a)
    world.a.host.faults.hanging.add("stop")
    ending = asyncio.create_task(Shutdown(world.a).run())

    async def noted() -> bool:
        return world.a.restarts.notes.host_ends

    await eventually(noted)
    ending.cancel()
    await asyncio.gather(ending, return_exceptions=True)
    await agent_dies(world.a)
    world.a.host.faults.hanging.clear()
    world.a.host.power_off(WEB)
    await agent_starts(world.a, boot)
    await runs_under(world.a, before.token + 1)


async def test_without_the_store_guests_are_shut_down_all_the_same(world: World) -> None:
    before = await started(world.a)
    world.a.store.faults.unavailable = True
    assert (await Shutdown(world.a).run()).powered_off == (WEB,)
    await host_dies(world.a)
    world.a.store.faults.unavailable = False
    assert await record_of(world.a) == before
    await agent_starts(world.a, "boot-2")
    await runs_under(world.a, before.token + 1)


async def test_a_host_that_was_off_for_days_starts_them(world: World) -> None:
    before = await started(world.a)
    await Shutdown(world.a).run()
    await host_dies(world.a)
    world.a.clock = lambda: time.time() + 2 * GIVE_UP_S
    await agent_starts(world.a, "boot-2")
    await runs_under(world.a, before.token + 1)


async def test_shutdowns_in_order_are_no_losses_in_a_row(world: World) -> None:
    before = await started(world.a)
    for number in range(TRIES + 1):
        await Shutdown(world.a).run()
        await host_dies(world.a)
        await agent_starts(world.a, f"boot-{number + 2}")
        await runs_under(world.a, before.token + 1 + number)


async def test_one_that_was_starting_is_shut_down_too(world: World) -> None:
    """It had been let in before, and is there when the others have ended."""
    await _many(world.a, {"db": 0})
    await world.a.domains.define(spec_of())
    world.a.host.faults.hanging.add("stop")
    ending = asyncio.create_task(Shutdown(world.a).run())
    await world.a.domains.start(WEB)
    world.a.host.faults.hanging.clear()
    world.a.host.faults.release()
    assert (await ending).powered_off == ("db", WEB)


# --- migrations --------------------------------------------------------------------------------


async def test_a_migration_ends_as_it_would(world: World) -> None:
    before = await started(world.a)
    await world.a.domains.locks.claim_for_migration(WEB, MIGRATION)
    shutdown = Shutdown(world.a)
    ending = asyncio.create_task(shutdown.run())

    async def noted() -> bool:
        return world.a.restarts.notes.host_ends

    await eventually(noted)
    assert WEB in world.a.host.guests
    after = before.passed_to(world.b.name)
    assert await world.a.ownership.compare_and_set(before, after)
    world.a.host.kill(WEB)
    world.a.domains.locks.release_from_migration(WEB, MIGRATION)
    assert await ending == GuestsEnded()
    assert not shutdown.cancelled
    await host_dies(world.a)
    await agent_starts(world.a, "boot-2")
    await stays(world.a, OwnershipState.RUNNING, after.token, "b")


async def test_one_that_takes_long_is_cancelled_and_its_guest_shut_down(world: World) -> None:
    before = await started(world.a)
    await world.a.domains.locks.claim_for_migration(WEB, MIGRATION)
    shutdown = Shutdown(world.a)
    assert await shutdown.run(0.2) == GuestsEnded(powered_off=(WEB,))
    assert shutdown.cancelled == [(MIGRATION, "a, which goes down")]
    await host_dies(world.a)
    await agent_starts(world.a, "boot-2")
    await runs_under(world.a, before.token + 1)


async def test_one_that_can_not_be_cancelled_keeps_its_guest(world: World) -> None:
    await started(world.a)
    await world.a.domains.locks.claim_for_migration(WEB, MIGRATION)
    shutdown = Shutdown(world.a)
    shutdown.lets_go = False
    ended = await shutdown.run(0.2)
    assert "still being migrated (migration m-1)" in ended.left[0].why
    assert WEB in world.a.host.guests


# --- without the agent -------------------------------------------------------------------------


@pytest.mark.parametrize("boot", ["boot-1", "boot-2"])
@pytest.mark.parametrize("heeds", [True, False])
async def test_guests_without_an_agent_are_shut_down_and_start_again(
    world: World, boot: str, heeds: bool
) -> None:
    before = await started(world.a)
    await agent_dies(world.a)
    world.a.host.faults.ignores_power_button = not heeds
    ended = await without_agent(world.a.hypervisor, world.a.restarts, SOON_S)
    assert ended == (GuestsEnded(powered_off=(WEB,)) if heeds else GuestsEnded(forced=(WEB,)))
    assert await record_of(world.a) == before
    await agent_starts(world.a, boot)
    await runs_under(world.a, before.token + 1)


async def test_a_host_without_guests_has_nothing_to_note(world: World) -> None:
    await agent_dies(world.a)
    assert await without_agent(world.a.hypervisor, world.a.restarts, SOON_S) == GuestsEnded()
    assert not world.a.restarts.notes.host_ends
