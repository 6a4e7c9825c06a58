"""An agent that is restarted in the middle of its migrations, on simulated nodes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec
import pytest

from migrator.errors import StoreError, WrongStateError
from migrator.journal import MigrationJournal
from migrator.journal_entry import JournalEntry
from migrator.left_tracking import OpenMemory
from migrator.model import (
    DomainName,
    MigrationMode,
    MigrationProgress,
    MigrationState,
    PassKind,
    PassReport,
)
from migrator.ports import AbortOutcome
from migrator.session import vocabulary as v
from node_agent.migrations import manager as manager_module
from node_agent.migrations.manager import MigrationManager
from node_agent.resources import MIGRATIONS
from tests.unit.migration_world import (
    WEB,
    check_back_home,
    eventually,
    held_in_precopy,
    migration_world,
)

_S = MigrationState


async def test_a_restarted_source_ends_what_it_had_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And tells what it was at, and how far it had come."""
    async with migration_world(tmp_path, monkeypatch) as world:
        began, _ = await held_in_precopy(world)
        sent = v.EngineReported(bytes_sent=7_000, remaining_bytes=900, throughput_bytes_per_s=1e3)
        publisher = world.a.manager._publisher
        publisher._written_at.clear()  # As a second later.
        world.a.manager._runners[began.id].feed(sent)

        async def published() -> bool:
            return (await publisher.read(began.id)).progress.bytes_sent == 7_000

        await eventually(published)
        await world.a.crash()
        await world.a.restart(world.b)
        ended = await check_back_home(world, began, _S.FAILED)
        assert ended.error == "the agent restarted during the migration"
        assert ended.progress.bytes_sent == 7_000
        phases = {phase.name: phase for phase in ended.timeline}
        assert list(phases) == [
            *("created", "setup", "precopy"),
            *("agent restart", "recovering", "cancelling"),
        ]
        assert len(phases) == len(ended.timeline)
        assert phases["precopy"].detail == "cut off by the agent's end"
        assert phases["recovering"].detail == "the agent restarted"


async def test_a_cancel_while_the_source_s_agent_starts_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Peers may call before the restored migrations go on."""
    async with migration_world(tmp_path, monkeypatch) as world:
        began, _ = await held_in_precopy(world)
        await world.a.crash()
        going_on = MigrationManager.open

        async def cancelled_before(
            manager: MigrationManager, adopted: Sequence[DomainName]
        ) -> None:
            with pytest.raises(WrongStateError, match="recovering"):
                await manager.cancel(began.id)
            await going_on(manager, adopted)

        monkeypatch.setattr(MigrationManager, "open", cancelled_before)
        await world.a.restart(world.b)
        ended = await check_back_home(world, began, _S.FAILED)
        assert ended.error == "the agent restarted during the migration"


async def test_an_agent_ends_the_tracking_that_its_predecessor_s_engines_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not of guests that are being migrated: that is for their migrations' ends."""
    cleared: list[DomainName] = []

    async def clear(_: OpenMemory, domain: DomainName) -> None:
        cleared.append(domain)

    monkeypatch.setattr(manager_module, "clear_tracking", clear)
    async with migration_world(tmp_path, monkeypatch) as world:
        began, _ = await held_in_precopy(world)
        await world.a.crash()
        await world.a.restart(world.b)
        await check_back_home(world, began, _S.FAILED)
        assert cleared == []
        await world.a.crash()
        await world.a.restart(world.b)
        await world.until(lambda: cleared == [WEB])


async def test_a_cancel_under_way_outlives_the_source_s_agent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with migration_world(tmp_path, monkeypatch) as world:
        began, live = await held_in_precopy(world)

        async def stuck(_: DomainName) -> AbortOutcome:
            await asyncio.Event().wait()
            raise AssertionError

        with monkeypatch.context() as patched:
            patched.setattr(world.a.node.hypervisor, "abort_switchover", stuck)
            await world.a.manager.cancel(began.id, "user alice")
            assert live.state is _S.CANCELLING
            await world.a.crash()
        await world.a.restart(world.b)
        ended = await check_back_home(world, began, _S.CANCELLED)
        assert (ended.error, ended.cancelled_by) == ("cancelled by user alice", "user alice")


async def test_a_cancel_is_answered_although_the_journal_hangs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with migration_world(tmp_path, monkeypatch) as world:
        began, live = await held_in_precopy(world)
        going_on = asyncio.Event()
        write = MigrationJournal.write

        async def slow(
            journal: MigrationJournal, entry: JournalEntry, *, durable: bool = True
        ) -> None:
            await going_on.wait()
            await write(journal, entry, durable=durable)

        monkeypatch.setattr(MigrationJournal, "write", slow)
        monkeypatch.setattr(manager_module, "_NOTED_S", 0.01)
        assert (await world.a.manager.cancel(began.id, "me")).cancelled_by == "me"
        assert live.state in (_S.CANCELLING, _S.CANCELLED)
        assert began.id in world.a.manager._runners, "its end isn't journalled, and so not told"
        going_on.set()
        assert (await check_back_home(world, began, _S.CANCELLED)).cancelled_by == "me"


async def test_a_cancel_whose_end_was_not_published_is_published_with_who_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with migration_world(tmp_path, monkeypatch) as world:
        began, _ = await held_in_precopy(world)
        await world.a.manager.cancel(began.id, "user alice")
        await check_back_home(world, began, _S.CANCELLED)
        await world.until(lambda: began.id not in world.a.manager._runners)
        await world.a.node.typed.put(f"{MIGRATIONS}{began.id}", began)  # As it was before.
        await world.a.crash()
        await world.a.restart(world.b)
        ended = await world.ended(began)
        assert (ended.state, ended.cancelled_by) == (_S.CANCELLED, "user alice")


async def test_a_restarted_destination_is_heard_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its last word goes out although the connection has to be made first."""
    async with migration_world(tmp_path, monkeypatch) as world:
        began, _ = await held_in_precopy(world)
        await world.b.crash()
        started = time.monotonic()
        await world.b.restart(world.a)
        ended = await check_back_home(world, began, _S.FAILED)
        assert ended.error is not None
        assert "the destination gave up" in ended.error
        assert time.monotonic() - started < 10.0


async def test_ends_that_were_not_published_are_published_by_the_next_agent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with migration_world(tmp_path, monkeypatch) as world:
        ended = await world.ended(await world.migrate())
        moving = MigrationProgress(state=_S.PRECOPY)
        unpublished = msgspec.structs.replace(
            ended, state=_S.PRECOPY, progress=moving, ended_at_s=None, total_s=None
        )
        never_begun = msgspec.structs.replace(unpublished, id="never", state=_S.CREATED)
        anothers = msgspec.structs.replace(unpublished, id="other", source="b")
        for each in (unpublished, never_begun, anothers):
            await world.a.node.typed.put(f"{MIGRATIONS}{each.id}", each)
        await world.a.crash()
        await world.a.restart(world.b)
        publisher = world.a.manager._publisher

        async def is_ended() -> bool:
            return (await publisher.read("never")).ended

        await eventually(is_ended)
        assert (await publisher.read("never")).state is _S.FAILED
        now = await publisher.read(ended.id)
        assert (now.state, now.progress.state) == (_S.COMPLETED, _S.COMPLETED)
        assert now.ended_at_s == ended.ended_at_s
        assert not (await publisher.read("other")).ended


async def test_a_note_that_fails_says_what_is_not_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with migration_world(tmp_path, monkeypatch) as world:
        began, _ = await held_in_precopy(world)
        runner, journal = world.b.manager._runners[began.id], world.b.manager._journal
        handle, write = runner.session.handle, journal.write
        failures: list[v.CommandFailed] = []

        async def full(entry: JournalEntry, *, durable: bool = True) -> None:
            if entry.resuming and not failures:
                raise StoreError("the disk is full")
            await write(entry, durable=durable)

        def heard(event: v.Event, now: float) -> list[v.Command]:
            if isinstance(event, v.CommandFailed):
                failures.append(event)
            return handle(event, now)

        monkeypatch.setattr(journal, "write", full)
        monkeypatch.setattr(runner.session, "handle", heard)
        world.script.hold_at_pass = None
        report = PassReport(
            number=1, kind=PassKind.FIRST, seconds=0.01, pages=100, bytes_sent=4096, pending_pages=0
        )
        world.a.manager._runners[began.id].feed(v.PassFinished(report=report))
        ended = await world.ended(began)
        assert ended.state is _S.COMPLETED, ended.error
        assert [each.dropped for each in failures] == [(v.ResumeGuest(),)]


async def test_a_cap_that_is_changed_in_post_copy_outlives_the_source_s_agent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next agent's engine had the one from before, and so had whoever looked."""
    async with migration_world(tmp_path, monkeypatch) as world:
        began = await world.migrate(mode=MigrationMode.POSTCOPY)
        runner = world.a.manager._runners[began.id]
        await world.until(lambda: runner.session.state is _S.POSTCOPY)
        await world.a.manager.limit(began.id, 5_000_000)
        await runner.journalled(20.0)
        await world.a.crash()
        await world.a.restart(world.b)
        session = world.a.manager._runners[began.id].session
        assert session.request.bandwidth_bytes_per_s == 5_000_000


@pytest.mark.parametrize("while_away", [True, False])
async def test_a_post_copy_whose_source_s_agent_was_restarted_ends_with_the_last_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, while_away: bool
) -> None:
    """Said while that agent is away, or to the next one: the source's copy goes, and both end."""
    async with migration_world(tmp_path, monkeypatch) as world:
        began = await world.migrate(mode=MigrationMode.POSTCOPY)
        runner = world.a.manager._runners[began.id]
        await world.until(lambda: runner.session.state is _S.POSTCOPY)
        await runner.journalled(20.0)
        await world.a.crash()
        destination = world.b.manager._runners[began.id]
        if while_away:
            destination.feed(v.PagesComplete())
            await world.until(lambda: began.id not in world.b.manager._runners)
        await world.a.restart(world.b)
        if not while_away:
            session = world.a.manager._runners[began.id].session
            await world.until(lambda: session.state is _S.POSTCOPY)
            destination.feed(v.PagesComplete())
        ended = await world.ended(began)
        assert (ended.state, ended.error) == (_S.COMPLETED, None)
        assert world.running() == ["b"]
        assert world.state(world.a) is None
        await world.until(lambda: not (world.a.manager._runners or world.b.manager._runners))
        assert destination.session.state is _S.COMPLETED
        assert world.b.node.domains.locks.migration_of(WEB) is None
        assert not world.script.running
