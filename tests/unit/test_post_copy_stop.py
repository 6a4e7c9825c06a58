"""A guest in post-copy whose domain is stopped: its source may be gone, and never say so."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest

from migrator.errors import ConflictError
from migrator.model import (
    DomainName,
    DomainState,
    DomainStatus,
    MigrationMode,
    MigrationRequest,
    MigrationState,
    OwnershipState,
)
from migrator.runner import Runner
from migrator.session import vocabulary as v
from migrator.session.messages import Filled
from tests.unit.migration_world import WEB, MigrationWorld, migration_world
from tests.unit.session_pair import DESTINATION, SessionPair


@pytest.fixture
async def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[MigrationWorld]:
    async with migration_world(tmp_path, monkeypatch) as made:
        yield made


async def in_post_copy(world: MigrationWorld) -> Runner:
    """The destination's runner of a guest that runs there and lacks pages."""
    began = await world.migrate(mode=MigrationMode.POSTCOPY)
    await world.until(
        lambda: (
            (runner := world.b.manager._runners.get(began.id)) is not None
            and runner.session.state is MigrationState.POSTCOPY
        )
    )
    assert world.running() == ["b"]
    return world.b.manager._runners[began.id]


async def test_a_guest_whose_source_is_gone_for_good_can_be_stopped(
    world: MigrationWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It waited for ever: nothing could be done with a domain that is being migrated."""
    runner = await in_post_copy(world)
    await world.a.crash()
    node = world.b.node
    monkeypatch.setattr(node.migrations, "stop_in_post_copy", world.b.manager.stop_in_post_copy)
    with pytest.raises(ConflictError, match="is being migrated"):
        await node.cluster.stop(WEB, 0.02)  # As a drain does.
    assert (await node.cluster.power_off(WEB, 0.02, in_post_copy=True)).forced
    assert (await node.cluster.get_domain(WEB)).state is DomainState.STOPPED
    assert runner.session.state is MigrationState.FAILED
    assert runner.session.error == "the domain was stopped before its guest had all of its pages"
    assert world.running() == []
    record = await node.ownership.read(WEB)
    assert record is not None
    assert (record.owner, record.state) == ("b", OwnershipState.STOPPED)
    await node.domains.start(WEB)
    assert world.running() == ["b"]


async def test_a_source_that_is_there_hears_of_it(world: MigrationWorld) -> None:
    runner = await in_post_copy(world)
    assert await world.b.manager.stop_in_post_copy(WEB, 0.0)
    await world.until(lambda: not world.a.manager._runners)
    assert world.state(world.a) is None
    ended = await world.a.manager.get(runner.session.migration_id)
    assert ended.state is MigrationState.FAILED
    assert ended.error == "the domain was stopped before its guest had all of its pages"


async def test_pages_that_come_in_time_are_waited_for(world: MigrationWorld) -> None:
    runner = await in_post_copy(world)
    runner.feed(v.PagesComplete())
    assert not await world.b.manager.stop_in_post_copy(WEB, 20.0)
    assert runner.session.state is MigrationState.COMPLETED
    assert world.running() == ["b"]
    await world.b.node.domains.stop(WEB, timeout_s=0.0)
    assert world.running() == []


async def test_what_isnt_in_post_copy_is_not_its_concern(world: MigrationWorld) -> None:
    assert not await world.a.manager.stop_in_post_copy(WEB, 20.0)
    assert world.running() == ["a"]


async def test_a_hypervisor_that_tells_the_next_agent_nothing_can_be_stopped(
    world: MigrationWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its main loop may wait for a page, too."""
    runner = await in_post_copy(world)
    await world.a.crash()
    await runner.journalled(20.0)
    await world.b.crash()
    inspect = world.b.node.hypervisor.inspect

    async def silent(domain: DomainName) -> DomainStatus:
        status = await inspect(domain)
        if status.state is DomainState.STOPPED:
            return status
        return msgspec.structs.replace(status, state=DomainState.UNKNOWN, reason="it is silent")

    monkeypatch.setattr(world.b.node.hypervisor, "inspect", silent)
    await world.b.restart(world.a)
    session = world.b.manager._runners[runner.session.migration_id].session
    recovering = MigrationState.RECOVERING
    await world.until(lambda: session.state is recovering and "silent" in vars(session)["_stuck"])
    assert await world.b.manager.stop_in_post_copy(WEB, 0.0)
    assert session.state is MigrationState.FAILED
    assert world.running() == []
    record = await world.b.node.ownership.read(WEB)
    assert record is not None
    assert (record.owner, record.state) == ("b", OwnershipState.STOPPED)


@pytest.mark.parametrize("restarted", [True, False])
def test_a_guest_whose_resume_nobody_heard_of_is_ended(restarted: bool) -> None:
    """And its source, should it come back after all, mustn't take it back."""
    pair = SessionPair(MigrationRequest(destination="n2", mode=MigrationMode.POSTCOPY))
    if restarted:
        pair.run()
    else:
        pair.fail(v.ResumeGuest)
    pair.fail(v.InspectGuest)
    if restarted:
        pair.restart(DESTINATION)
    pair.run()
    assert pair.destination.state in (MigrationState.HANDOFF, MigrationState.RECOVERING)
    pair.push(pair.destination, v.CancelRequested(reason="it was stopped"))
    assert pair.run() == (MigrationState.FAILED, MigrationState.FAILED)
    assert pair.source.error == "it was stopped"
    assert isinstance(pair.destination.last_word(), Filled)


def test_a_guest_that_never_ran_is_not_ended_for_a_stop() -> None:
    """The source may take it back."""
    pair = SessionPair(MigrationRequest(destination="n2", mode=MigrationMode.POSTCOPY))
    pair.silence(v.Fence)
    pair.run()
    pair.fail(v.InspectGuest)
    pair.restart(DESTINATION)
    pair.run()
    pair.push(pair.destination, v.CancelRequested(reason="it was stopped"))
    pair.run()
    assert pair.destination.state is MigrationState.RECOVERING
    assert "DestroyGuest" not in pair.commands(DESTINATION)
