"""Whole migrations through two MigrationManagers: real sessions, runners, journals and peers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec
import pytest

from hypervisor.simulated.driver import COME_UP
from migrator.errors import ConflictError, RefusedError, WrongStateError
from migrator.model import (
    ENDED,
    DomainState,
    MigrationId,
    MigrationRequest,
    MigrationState,
    NodeName,
    OwnershipState,
    PassKind,
    PassReport,
    Role,
)
from migrator.ports import AbortOutcome
from migrator.session import source_leave
from migrator.session import vocabulary as v
from migrator.session.messages import Prepare
from migrator.session.source import SourceSession
from node_agent.domain_locks import DomainLocks
from node_agent.migrations import checks, room
from node_agent.migrations.checks import Inspection, claim_reasons
from node_agent.migrations.removed_peers import part_with
from node_agent.migrations.site import Envelope
from storage.simulated import SimulatedPool
from tests.unit.migration_world import (
    WEB,
    check_back_home,
    end_first_pass,
    eventually,
    held_in_first_pass,
    held_in_precopy,
    migration_world,
)

_S = MigrationState


@pytest.mark.parametrize("step_s", [86_400.0, -86_400.0])
async def test_a_clock_that_is_set_in_the_midst_makes_no_blackout_of_a_day(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step_s: float
) -> None:
    real, ahead_s = time.time, 0.0

    def wall() -> float:
        return real() + ahead_s

    monkeypatch.setattr(time, "time", wall)
    async with migration_world(tmp_path, monkeypatch) as world:
        for each in (world.a, world.b):
            monkeypatch.setattr(each.node.host, "clock", wall)
        began, _ = await held_in_precopy(world)
        ahead_s = step_s
        world.script.hold_at_pass = None
        report = PassReport(
            number=1, kind=PassKind.FIRST, seconds=0.01, pages=100, bytes_sent=4096, pending_pages=0
        )
        world.a.manager._runners[began.id].feed(v.PassFinished(report=report))
        ended = await world.ended(began)
        assert ended.state is _S.COMPLETED, ended.error
        assert ended.blackout_ms is not None and 0.0 <= ended.blackout_ms < 30_000.0
        assert ended.total_s is not None and 0.0 <= ended.total_s < 30.0
        assert all(0.0 <= phase.seconds < 30.0 for phase in ended.timeline)


async def test_a_guest_moves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source_leave, "_FRESH_S", 60.0)  # One that came late costs another pass.
    async with migration_world(tmp_path, monkeypatch) as world:
        world.script.dirty.extend([10])
        before = await world.a.node.ownership.read(WEB)
        began, _ = await held_in_precopy(world)
        assert began.state is _S.CREATED  # Its hooks come first, though there are none.
        end_first_pass(world, pending_pages=5_000)
        ended = await world.ended(began)
        assert ended.state is _S.COMPLETED, ended.error
        assert ended.blackout_ms is not None
        assert [each.kind for each in ended.iterations] == [
            PassKind.FIRST,
            PassKind.DIRTY,
            PassKind.FINAL,
        ]
        await world.until(lambda: not world.b.manager._runners)
        assert world.running() == ["b"]
        assert world.state(world.a) is None
        after = await world.a.node.ownership.read(WEB)
        assert before is not None
        assert after == before.passed_to(world.b.node.name)
        assert not world.script.running
        # It can go back at once, and be used there.
        request = MigrationRequest(destination="a")
        back = await world.b.manager.create(WEB, request)
        await world.until(lambda: world.running() == ["a"])
        await world.until(lambda: back.id not in world.b.manager._runners)
        await world.until(lambda: not world.a.manager._runners)
        assert await world.a.node.domains.stop(WEB)


async def test_a_late_prepare_harms_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a migration that has ended, at a node where the domain runs by now."""
    async with migration_world(tmp_path, monkeypatch) as world:
        spec = (await world.a.node.records.get(WEB)).spec
        request = MigrationRequest(destination="b")
        late = Prepare(spec=spec, source="a", token=1, request=request)
        assert (await world.ended(await world.migrate())).state is _S.COMPLETED
        await world.until(lambda: not world.b.manager._runners)
        envelope = Envelope(migration_id="late", to=Role.DESTINATION, message=late)
        await world.b.manager._on_message(NodeName("a"), envelope)
        assert not world.b.manager._runners
        assert world.running() == ["b"]
        assert world.b.node.domains.locks.migration_of(WEB) is None
        # Nor where it has run, and doesn't any more: the record knows of no such migration.
        await world.a.manager._on_message(NodeName("b"), envelope)
        assert not world.a.manager._runners
        assert world.state(world.a) is None


async def test_a_cancel_brings_it_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with migration_world(tmp_path, monkeypatch) as world:
        began, _ = await held_in_precopy(world)
        with pytest.raises(ConflictError):
            await world.a.node.domains.stop(WEB)
        with pytest.raises(RefusedError, match="migrated already"):
            await world.migrate()
        cancelling = await world.a.manager.cancel(began.id, "user alice (operator, token 17)")
        assert cancelling.cancelled_by == "user alice (operator, token 17)"
        ended = await check_back_home(world, began, _S.CANCELLED)
        assert ended.error == "cancelled by user alice (operator, token 17)"
        with pytest.raises(
            WrongStateError, match=r"was cancelled already, at .* UTC \(cancelled by"
        ):
            await world.a.manager.cancel(began.id)
        with pytest.raises(WrongStateError, match="there is nothing to change any more"):
            await world.a.manager.limit(began.id, None)
        await world.until(lambda: not world.a.node.events._waiting)
        events = [e for e in await world.a.node.events.read() if e.migration == began.id]
        assert [e.message for e in events if "alice" in e.message] == [
            "domain web: migration is in cancelling: cancelled by user alice (operator, token 17)",
            "domain web: migration from a to b was cancelled by user alice (operator, token 17)",
        ]
        assert events[-1].data["by"] == "user alice (operator, token 17)"


async def test_a_removed_node_s_migrations_end_on_both_sides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And their engines, which hold the connections that pages travel over."""
    async with migration_world(tmp_path, monkeypatch) as world:
        began, live = await held_in_precopy(world)
        part_with("c", world.a.manager.active_with(NodeName("c")))
        assert live.state is _S.PRECOPY, "another node's removal is nothing to it"
        part_with("b", world.a.manager.active_with(NodeName("b")))
        ended = await check_back_home(world, began, _S.CANCELLED)
        assert ended.error == "b was removed from the cluster"
        assert world.script.running == []

        began = await world.migrate()
        await world.until(lambda: bool(world.b.manager._runners))
        arriving = world.b.manager._runners[began.id].session
        await world.until(lambda: arriving.state is _S.PRECOPY)
        part_with("a", world.b.manager.active_with(NodeName("a")))
        await world.until(lambda: began.id not in world.b.manager._runners)
        assert arriving.error == "a was removed from the cluster"
        assert world.running() == ["a"]
        assert not [each for each in world.script.running if each.session.role is Role.DESTINATION]
        part_with("b", world.a.manager.active_with(NodeName("b")))
        await world.ended(began)
        part_with("b", world.a.manager.active_with(NodeName("b")))  # Nothing is left to end.


async def test_after_the_handoff_a_removal_takes_nobody_s_guest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with migration_world(tmp_path, monkeypatch) as world:
        began = await world.migrate()
        live = world.a.manager._runners[began.id].session

        def handed_over() -> bool:
            """On both sides: a destination that hasn't heard of it may still give up."""
            there = world.b.manager._runners.get(began.id)
            in_handoff = there is not None and there.session.state in (_S.HANDOFF, *ENDED)
            return live.state in ENDED or (in_handoff and live.state is _S.HANDOFF)

        await world.until(handed_over)
        part_with("b", world.a.manager.active_with(NodeName("b")))
        part_with("a", world.b.manager.active_with(NodeName("a")))
        ended = await world.ended(began)
        assert ended.state is _S.COMPLETED, ended
        assert world.running() == ["b"]


async def test_a_refusal_of_the_destination_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with migration_world(tmp_path, monkeypatch) as world:
        world.b.node.host.faults.failing["start_incoming"] = 1
        began = await world.migrate()
        ended = await check_back_home(world, began, _S.FAILED)
        assert ended.error is not None
        assert "start_incoming failed" in ended.error


async def test_a_destination_that_doesnt_come_up_says_why_though_pages_went_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with migration_world(tmp_path, monkeypatch) as world:
        faults = world.b.node.host.faults
        faults.hanging.add(COME_UP)
        began, live = await held_in_first_pass(world)
        faults.hanging.clear()
        faults.failing[COME_UP] = 1
        faults.release()
        ended = await check_back_home(world, began, _S.FAILED)
        assert ended.error == f"the destination refused: simulated fault: {COME_UP} failed " + (
            "and changed nothing"
        )
        assert any(phase.name == "precopy" for phase in live.timeline)


async def test_a_guest_isnt_paused_before_its_destination_has_come_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with migration_world(tmp_path, monkeypatch) as world:
        faults = world.b.node.host.faults
        faults.hanging.add(COME_UP)
        began = await world.migrate()
        live = world.a.manager._runners[began.id].session
        assert isinstance(live, SourceSession)
        await world.until(lambda: live._leaving is not None)
        up_at_s = time.time()
        faults.hanging.clear()
        faults.release()
        ended = await world.ended(began)
        assert ended.state is _S.COMPLETED, ended.error
        (switchover,) = [each for each in ended.timeline if each.name == "switchover"]
        assert switchover.started_at_s >= up_at_s


async def test_a_source_of_an_older_release_is_answered_when_all_is_prepared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It doesn't ask before it pauses the guest."""
    prepare = SourceSession._prepare
    monkeypatch.setattr(
        SourceSession,
        "_prepare",
        lambda self: msgspec.structs.replace(prepare(self), asks_whether_arrived=False),
    )
    async with migration_world(tmp_path, monkeypatch) as world:
        faults = world.b.node.host.faults
        faults.hanging.add(COME_UP)  # Isn't come by: pages don't go first.
        ended = await world.ended(await world.migrate())
        assert ended.state is _S.COMPLETED, ended.error


@pytest.mark.parametrize("role", list(Role))
async def test_an_engine_that_dies_costs_only_the_migration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, role: Role
) -> None:
    async with migration_world(tmp_path, monkeypatch) as world:
        began, _ = await held_in_precopy(world)
        world.script.engine(role).die()
        ended = await check_back_home(world, began, _S.FAILED)
        assert ended.error is not None
        assert ended.error.endswith(f"the {role}'s engine: it was killed by signal 9")


@pytest.mark.parametrize("step", ["begin_switchover", "continue_switchover"])
async def test_a_failed_step_of_the_switchover_brings_it_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    async with migration_world(tmp_path, monkeypatch) as world:
        world.a.node.host.faults.failing[step] = 1
        began = await world.migrate()
        await check_back_home(world, began, _S.FAILED)


async def test_a_driver_with_a_bug_leaves_no_session_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with migration_world(tmp_path, monkeypatch) as world:
        hypervisor = world.a.node.hypervisor
        abort, tries = hypervisor.abort_switchover, 0

        async def buggy(domain: object) -> AbortOutcome:
            nonlocal tries
            tries += 1
            if tries == 1:
                raise OSError(9, "Bad file descriptor")
            return await abort(WEB)

        monkeypatch.setattr(hypervisor, "abort_switchover", buggy)
        world.script.hold_at_pass = PassKind.FIRST
        began = await world.migrate()
        await world.until(lambda: len(world.script.running) == 2)
        await world.a.manager.cancel(began.id)
        await check_back_home(world, began, _S.CANCELLED)
        assert tries == 2


async def test_a_lost_connection_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody else calls the peer: the session's timer must not be all that looks for it."""
    async with migration_world(tmp_path, monkeypatch) as world:
        world.script.hold_at_pass = PassKind.FIRST
        began = await world.migrate()
        runner = world.a.manager._runners[began.id]
        await world.until(lambda: runner.session.state is _S.PRECOPY)
        link = world.a.node.hub._links[world.b.node.name]
        assert link._connection is not None
        link._connection.abort("cut")
        await world.until(lambda: v.TimerName.PEER in runner._timers)
        await world.until(lambda: v.TimerName.PEER not in runner._timers)
        assert runner.session.state is _S.PRECOPY
        await world.until(lambda: not world.a.manager._redials.tasks)
        await world.a.manager.cancel(began.id)
        await check_back_home(world, began, _S.CANCELLED)


async def test_a_guest_that_ends_in_its_migration_is_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with migration_world(tmp_path, monkeypatch) as world:
        began, _ = await held_in_precopy(world)
        world.a.node.host.power_off(WEB)
        ended = await world.ended(began)
        assert ended.state is _S.FAILED
        await world.until(lambda: not world.b.manager._runners)
        assert world.state(world.b) is None

        async def is_stopped() -> bool:
            record = await world.a.node.ownership.read(WEB)
            return record is not None and record.state is OwnershipState.STOPPED

        await eventually(is_stopped)
        assert world.state(world.a) in (None, DomainState.STOPPED)


async def test_a_full_disk_is_a_reason_against_it_on_either_node(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither can journal: found out before the domain is claimed, not in the middle."""
    async with migration_world(tmp_path, monkeypatch) as world:
        full = world.b.folder
        monkeypatch.setattr(room, "free_bytes", lambda folder: 0 if folder == full else 2**30)
        with pytest.raises(RefusedError, match="node b: its disk is full: 0 KiB free"):
            await world.migrate()
        full = world.a.folder
        with pytest.raises(RefusedError, match="a, where it runs: its disk is full"):
            await world.migrate()
        assert world.running() == ["a"]
        full = tmp_path
        began = await world.migrate()
        assert (await world.ended(began)).state is _S.COMPLETED


async def test_another_storage_behind_a_pool_s_name_is_a_reason_against_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder that isn't mounted there: the guest would go on with other disks than its own."""
    marks: dict[str, str] = {}

    async def mark(pool: SimulatedPool) -> str | None:
        return marks.get(pool.node)

    monkeypatch.setattr(SimulatedPool, "mark", mark)
    async with migration_world(tmp_path, monkeypatch) as world:
        marks = {"a": "x", "b": "y"}
        with pytest.raises(RefusedError, match="node b: its pool default is another storage"):
            await world.migrate()
        assert world.running() == ["a"]
        for none_or_same in ({"a": "x"}, {"b": "x"}, {"a": "x", "b": "x"}):
            marks = none_or_same
            assert await world.a.manager.check(WEB, MigrationRequest(destination="b")) == []
        assert (await world.ended(await world.migrate())).state is _S.COMPLETED


async def test_storage_that_hangs_is_told_as_that_and_not_as_a_silent_node(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def hang(pool: SimulatedPool, volume: str) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(checks, "LOOK_S", 0.05)
    async with migration_world(tmp_path, monkeypatch) as world:
        monkeypatch.setattr(SimulatedPool, "inspect", hang)
        found = await world.a.manager.check(WEB, MigrationRequest(destination="b"))
    assert found == [
        "node b: volume default/root: its storage gives no answer within 0.05 s",
    ]


async def test_a_guest_that_is_paused_while_its_destination_is_asked_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A destination runs what it has loaded: somebody wants this one to stand still."""
    async with migration_world(tmp_path, monkeypatch) as world:
        check = world.b.manager._check
        reasons = check.reasons

        async def pause_meanwhile(inspection: Inspection) -> Sequence[str]:
            await world.a.node.domains.pause(WEB)
            return await reasons(inspection)

        monkeypatch.setattr(check, "reasons", pause_meanwhile)
        with pytest.raises(RefusedError, match=r"is paused, it must be running .*resume web"):
            await world.migrate()
        assert world.state(world.a) is DomainState.PAUSED
        assert not world.a.manager._runners
        await world.a.node.domains.resume(WEB)


async def test_a_source_that_is_cut_off_from_its_storage_is_a_reason_against_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with migration_world(tmp_path, monkeypatch) as world:
        away = "pool default hasn't answered for 40 s (it is lost)"

        async def troubles(_: object) -> list[str]:
            return [away]

        monkeypatch.setattr(world.a.node.domains, "storage_troubles", troubles)
        with pytest.raises(RefusedError, match="a, where it runs: pool default hasn't answered"):
            await world.migrate()
        assert world.running() == ["a"]


async def test_a_claim_of_a_migration_that_has_ended_is_told_as_that() -> None:
    locks = DomainLocks()
    assert claim_reasons(locks, WEB) == []
    await locks.claim_for_migration(WEB, MigrationId("m1"))
    assert "being migrated already (migration m1)" in claim_reasons(locks, WEB)[0]
    locks.end_migration(WEB, MigrationId("m1"))
    assert "has ended and can't let go yet" in claim_reasons(locks, WEB)[0]
    locks.release_from_migration(WEB, MigrationId("m1"))
    assert claim_reasons(locks, WEB) == []
