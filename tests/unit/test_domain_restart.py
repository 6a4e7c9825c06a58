"""Domains that were lost with their node, or while an agent died: started again, or left alone."""

from __future__ import annotations

import time
from pathlib import Path

import msgspec
import pytest

from migrator.errors import FabricError, StoreError, WrongStateError
from migrator.model import DomainName, MigrationId, NodeName, OwnershipRecord, OwnershipState
from node_agent import domain_restart
from node_agent.domain_restart import GIVE_UP_S, PARALLEL, TRIES, WITHIN_S
from node_agent.restart_notes import RestartFile, RestartNotes, Wanted
from tests.unit.agent_world import SimulatedNode, World, spec_of
from tests.unit.node_life import (
    RUNNING,
    STOPPED,
    WEB,
    agent_dies,
    agent_starts,
    eventually,
    history,
    host_dies,
    record_of,
    runs_under,
    started,
    stays,
    told,
)


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(domain_restart, "PAUSE_S", 0.01)


# --- the host ------------------------------------------------------------------------------------


async def test_what_was_lost_with_the_host_is_started_again(world: World) -> None:
    before = await started(world.a)
    await host_dies(world.a)
    await agent_starts(world.a, "boot-2")
    await runs_under(world.a, before.token + 1)
    await told(world.a, "it is to be started again: a was rebooted, or lost power")
    await told(world.a, "was started again on a: a was rebooted, or lost power")


async def test_the_most_important_are_started_first_and_only_some_at_a_time(world: World) -> None:
    names = [f"vm{number}" for number in range(PARALLEL + 2)]
    for number, name in enumerate(names):
        spec = spec_of(name, disks=[], nics=[])
        await world.a.domains.define(msgspec.structs.replace(spec, priority=number))
        await world.a.domains.start(DomainName(name))
    await host_dies(world.a)
    world.a.host.faults.hanging.add("start")
    await agent_starts(world.a, "boot-2")

    async def begun() -> set[str]:
        records = await world.a.records.list_ownership()
        return {name for name, record in records.items() if record.token == 2}

    async def full() -> bool:
        return len(await begun()) == PARALLEL

    await eventually(full)
    assert await begun() == set(names[-PARALLEL:])
    world.a.host.faults.hanging.clear()
    world.a.host.faults.release()

    async def all_run() -> bool:
        return set(world.a.host.guests) == set(names)

    await eventually(all_run)


@pytest.mark.parametrize(
    ("token", "owner", "state"),
    [(3, "b", RUNNING), (2, "b", STOPPED), (1, "a", STOPPED)],
    ids=["taken over", "moved and stopped", "stopped"],
)
async def test_what_is_not_recorded_to_run_there_is_left_alone(
    world: World, token: int, owner: str, state: OwnershipState
) -> None:
    before = await started(world.a)
    await host_dies(world.a)
    after = OwnershipRecord(domain=WEB, token=token, owner=owner, state=state)
    assert await world.a.ownership.compare_and_set(before, after)
    await agent_starts(world.a, "boot-2")
    await stays(world.a, state, token, owner)


async def test_what_ended_unseen_in_the_same_boot_stays_stopped(world: World) -> None:
    before = await started(world.a)
    await host_dies(world.a)
    await agent_starts(world.a)
    await stays(world.a, STOPPED, before.token)


async def test_what_crashed_unseen_is_started_again(world: World) -> None:
    before = await started(world.a)
    await agent_dies(world.a)
    world.a.host.kill(WEB, crashed=True)
    await agent_starts(world.a)
    await runs_under(world.a, before.token + 1)
    await told(world.a, "its hypervisor died before this agent began")


@pytest.mark.parametrize("agent_dies_too", [False, True])
async def test_what_crashes_while_its_agent_begins_is_started_again(
    world: World, agent_dies_too: bool
) -> None:
    """It was adopted, and its end was heard by nobody yet. The driver forgot of it."""
    before = await started(world.a)
    await agent_dies(world.a)
    world.a.domains = world.a.make_domains()
    adopted = await world.a.hypervisor.open()
    world.a.host.kill(WEB, crashed=True)
    await world.a.domains.ownership.reconcile(adopted)
    if agent_dies_too:
        await agent_dies(world.a)
        await agent_starts(world.a)
    await runs_under(world.a, before.token + 1)


async def test_what_crashed_unseen_and_was_taken_over_is_forgotten(world: World) -> None:
    before = await started(world.a)
    await agent_dies(world.a)
    world.a.host.kill(WEB, crashed=True)
    after = OwnershipRecord(domain=WEB, token=before.token + 2, owner="b", state=RUNNING)
    assert await world.a.ownership.compare_and_set(before, after)
    await agent_starts(world.a)
    await stays(world.a, RUNNING, after.token, "b")
    assert not world.a.hypervisor.crashed()


async def test_the_first_agent_knows_of_no_boot_before(world: World) -> None:
    before = await started(world.a)
    await host_dies(world.a)
    world.a.restarts.notes = RestartNotes()
    await agent_starts(world.a, "boot-2")
    await stays(world.a, STOPPED, before.token)


async def test_nothing_is_started_again_where_that_is_switched_off(world: World) -> None:
    before = await started(world.a)
    await host_dies(world.a)
    await agent_starts(world.a, "boot-2", restart=False)
    await stays(world.a, STOPPED, before.token)
    await agent_dies(world.a)
    await agent_starts(world.a, "boot-2")
    await stays(world.a, STOPPED, before.token)


async def test_a_migration_decides_first(world: World) -> None:
    before = await started(world.a)
    await host_dies(world.a)
    await agent_starts(world.a, "boot-2", [WEB])
    await agent_dies(world.a)
    await agent_starts(world.a, "boot-2", [WEB])
    await world.a.domains.ownership._sweep_once()
    assert await record_of(world.a) == before
    world.a.domains.locks.release_from_migration(WEB, MigrationId("m-1"))
    await runs_under(world.a, before.token + 1)


async def test_what_a_migration_gave_to_another_node_is_not_started(world: World) -> None:
    before = await started(world.a)
    await host_dies(world.a)
    await agent_starts(world.a, "boot-2", [WEB])
    after = before.passed_to(NodeName("b"))
    assert await world.a.ownership.compare_and_set(before, after)
    world.a.domains.locks.release_from_migration(WEB, MigrationId("m-1"))
    await stays(world.a, RUNNING, after.token, "b")


async def test_an_agent_without_a_store_forgets_nothing(world: World) -> None:
    before = await started(world.a)
    await host_dies(world.a)
    world.a.store.faults.unavailable = True
    with pytest.raises(StoreError):
        await agent_starts(world.a, "boot-2")
    await agent_dies(world.a)
    world.a.store.faults.unavailable = False
    await agent_starts(world.a, "boot-2")
    await runs_under(world.a, before.token + 1)


# --- the agent -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("token", "state"),
    [(1, RUNNING), (1, STOPPED), (2, RUNNING), (2, STOPPED)],
    ids=["noted", "settled", "record won", "given back"],
)
async def test_a_restart_that_the_agents_end_cut_short_is_done_by_the_next(
    world: World, token: int, state: OwnershipState
) -> None:
    before = await started(world.a)
    await host_dies(world.a)
    after = OwnershipRecord(domain=WEB, token=token, owner="a", state=state)
    assert before == after or await world.a.ownership.compare_and_set(before, after)
    _want(world.a, before.token)
    await agent_starts(world.a)
    await runs_under(world.a, token + 1)


async def test_a_domain_that_went_elsewhere_and_came_back_meanwhile_is_not_started(
    world: World,
) -> None:
    before = await started(world.a)
    await host_dies(world.a)
    after = OwnershipRecord(domain=WEB, token=before.token + 2, owner="a", state=STOPPED)
    assert await world.a.ownership.compare_and_set(before, after)
    _want(world.a, before.token)
    await agent_starts(world.a)
    await stays(world.a, STOPPED, after.token)


async def test_a_domain_that_runs_already_is_not_wanted(world: World) -> None:
    before = await started(world.a)
    await agent_dies(world.a)
    _want(world.a, before.token)
    await agent_starts(world.a)
    await runs_under(world.a, before.token)


def _want(
    node: SimulatedNode, token: int, tries: tuple[float, ...] = (), age_s: float = 0.0
) -> None:
    wanted = Wanted(token=token, why="its hypervisor died", since_s=time.time() - age_s)
    node.restarts.notes = RestartNotes(
        boot_id="boot-1", wanted={WEB: wanted}, tries={WEB: tries} if tries else {}
    )


async def test_the_limit_holds_across_agents_and_boots(world: World) -> None:
    before = await started(world.a)
    for number in range(1, TRIES + 1):
        await host_dies(world.a)
        await agent_starts(world.a, f"boot-{number + 1}")
        await runs_under(world.a, before.token + number)
    await host_dies(world.a)
    await agent_starts(world.a, "boot-9")
    await stays(world.a, STOPPED, before.token + TRIES)
    assert "it is left stopped" in await history(world.a)
    await told(world.a, f"it was started again {TRIES} times in 10 minutes")


async def test_old_tries_do_not_count(world: World) -> None:
    before = await started(world.a)
    await host_dies(world.a)
    old = time.time() - WITHIN_S - 1
    _want(world.a, before.token, (old,) * TRIES)
    await agent_starts(world.a)
    await runs_under(world.a, before.token + 1)


# --- what else may be down -----------------------------------------------------------------------


async def test_a_start_that_fails_is_tried_again(world: World) -> None:
    before = await started(world.a)
    await host_dies(world.a)
    world.a.host.faults.failing["start"] = TRIES + 2
    await agent_starts(world.a, "boot-2")
    await runs_under(world.a, before.token + TRIES + 3)
    assert "could not be started again yet: simulated fault" in await history(world.a)


async def test_it_is_given_up_in_the_end(world: World) -> None:
    before = await started(world.a)
    await host_dies(world.a)
    _want(world.a, before.token, age_s=GIVE_UP_S + 1)
    await agent_starts(world.a)
    await stays(world.a, STOPPED, before.token)
    assert "could not be started again for 12 hours" in await history(world.a)


async def test_a_clock_that_is_set_after_the_boot_gives_nothing_up(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host's clock was wrong until NTP had its say, while domains waited for their storage."""
    before = await started(world.a)
    await host_dies(world.a)
    monkeypatch.setattr(world.a, "clock", lambda: time.time() - 2 * GIVE_UP_S)
    world.a.fabric.faults.plug_fails = True
    await agent_starts(world.a, "boot-2")

    async def failed() -> bool:
        return "could not be started again yet" in await history(world.a)

    await eventually(failed)
    monkeypatch.setattr(world.a, "clock", time.time)
    last = (await record_of(world.a)).token

    async def tried_since() -> bool:
        return (await record_of(world.a)).token > last

    await eventually(tried_since)
    world.a.fabric.faults.plug_fails = False

    async def runs() -> bool:
        return WEB in world.a.host.guests and not world.a.restarts.notes.wanted

    await eventually(runs)
    record = await record_of(world.a)
    assert record.state is RUNNING and record.token > before.token
    assert "left stopped" not in await history(world.a)


async def test_a_stop_calls_it_off(world: World) -> None:
    await fails_to_start_again(world.a)
    await world.b.cluster.stop(WEB, 1.0)
    world.a.fabric.faults.plug_fails = False
    await stays(world.a, STOPPED, (await record_of(world.a)).token)
    with pytest.raises(WrongStateError):
        await world.b.cluster.stop(WEB, 1.0)


async def fails_to_start_again(node: SimulatedNode) -> None:
    await started(node)
    node.fabric.faults.plug_fails = True
    node.host.kill(WEB, crashed=True)

    async def failed() -> bool:
        return "could not be started again yet" in await history(node)

    await eventually(failed)


@pytest.mark.parametrize("where", ["a", "b"])
async def test_an_operators_start_is_enough(
    world: World, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    monkeypatch.setattr(domain_restart, "PAUSE_S", 3600.0)
    await fails_to_start_again(world.a)
    world.a.fabric.faults.plug_fails = False
    await world.a.cluster.start(WEB, NodeName(where))
    record = await record_of(world.a)
    await world.a.domains.ownership.settle(WEB)
    assert await record_of(world.a) == record
    assert record.owner == where
    assert not world.a.restarts.notes.wanted


async def test_an_operators_start_that_fails_calls_nothing_off(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(domain_restart, "PAUSE_S", 3600.0)
    await fails_to_start_again(world.a)
    for _ in range(2):
        with pytest.raises(FabricError):
            await world.a.domains.start(WEB)
    await world.a.domains.ownership.settle(WEB)
    last = await record_of(world.a)
    assert world.a.restarts.notes.wanted[WEB].token == last.token
    world.a.fabric.faults.plug_fails = False
    await agent_dies(world.a)
    await agent_starts(world.a)
    await runs_under(world.a, last.token + 1)


async def test_a_disk_that_takes_no_notes_costs_no_restart(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = await started(world.a)
    await host_dies(world.a)

    async def full(_: RestartNotes) -> None:
        raise StoreError("the disk is full")

    monkeypatch.setattr(world.a.restarts, "save", full)
    await agent_starts(world.a, "boot-2")

    async def runs() -> bool:
        return WEB in world.a.host.guests

    await eventually(runs)
    assert (await record_of(world.a)).token == before.token + 1


async def test_the_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "restarts.json"
    assert await RestartFile(path).load() == RestartNotes()
    wanted = Wanted(token=7, why="its hypervisor died", since_s=1.5)
    notes = RestartNotes(boot_id="b", wanted={WEB: wanted}, tries={WEB: (1.0, 2.0)})
    await RestartFile(path).save(notes)
    assert await RestartFile(path).load() == notes
    assert not caplog.records
    path.write_text("{")
    assert await RestartFile(path).load() == RestartNotes()
    assert f"{path} is unreadable" in caplog.text
    with pytest.raises(StoreError, match="can't be written"):
        await RestartFile(tmp_path / "nowhere" / "restarts.json").save(notes)
    with pytest.raises(StoreError, match="can't be read"):
        await RestartFile(tmp_path).load()
