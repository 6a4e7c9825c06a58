"""A pair of sessions joined directly: the order of commands, refusals, cancels, recoveries."""

from __future__ import annotations

import pytest

from migrator.journal_entry import entry_of
from migrator.model import (
    MigrationMode,
    MigrationRequest,
    MigrationState,
    OnTimeout,
    Role,
)
from migrator.ports import DomainEventKind
from migrator.session import messages as m
from migrator.session import vocabulary as v
from tests.unit.session_pair import COMPLETED, DESTINATION, FAILED, SOURCE, SessionPair

_S = MigrationState


def _index(pair: SessionPair, kind: type[object], nth: int = 0) -> int:
    """Where in the order of all commands the `nth` of that kind (or message) was given."""
    found = [
        index
        for index, (_, command) in enumerate(pair.given)
        if isinstance(command, kind)
        or (isinstance(command, v.Send) and isinstance(command.message, kind))
    ]
    return found[nth]


# --- the happy path ---


def test_the_happy_path_gives_each_command_once_and_in_order() -> None:
    pair = SessionPair()
    assert pair.run() == COMPLETED
    assert pair.commands(SOURCE) == [
        *("Journal", "StartEngine", "PrepareSwitchover", "ConnectEngine", "RunPass"),
        *("AskLeave", "Journal", "BeginSwitchover", "RunPass", "ContinueSwitchover", "Journal"),
        *("DestroyGuest", "StopEngine", "Finish"),
    ]
    assert pair.commands(DESTINATION) == [
        *("Journal", "PrepareIncoming", "StartEngine", "Journal", "SwapRecord"),
        *("Fence", "Journal", "ResumeGuest", "Announce", "StopEngine", "Finish"),
    ]
    assert pair.messages(SOURCE) == ["Prepare", "Commit", "Farewell"]
    assert pair.messages(DESTINATION) == ["Prepared", "Running"]
    assert (pair.record.owner, pair.record.token) == ("n2", 2)
    assert not pair.timers


def test_the_guest_resumes_only_after_commit_record_and_fence() -> None:
    pair = SessionPair()
    pair.run()
    order = [v.ContinueSwitchover, m.Commit, v.SwapRecord, v.Fence, v.ResumeGuest, v.Announce]
    order += [m.Running, v.DestroyGuest]
    indices = [_index(pair, kind) for kind in order]
    assert indices == sorted(indices)


def test_only_the_journal_before_the_pause_costs_an_fsync() -> None:
    pair = SessionPair()
    pair.run()
    begun = _index(pair, v.BeginSwitchover)
    notes = [(index, each) for index, (_, each) in enumerate(pair.given)]
    durable = [index for index, each in notes if isinstance(each, v.Journal) and each.durable]
    assert durable
    assert max(durable) < begun


def test_the_timeline_has_the_phases_and_the_blackout_is_paused_to_resumed() -> None:
    pair = SessionPair()
    pair.run()
    view = pair.source.view()
    names = [phase.name for phase in view.timeline]
    for name in ("created", "setup", "precopy", "stop", "final pass", "device state", "handoff"):
        assert name in names
    assert names.index("load") + 1 == names.index("ownership record")
    assert names.index("fence") + 1 == names.index("activate")
    assert all(phase.seconds >= 0.0 for phase in view.timeline)
    paused = pair.source._paused_at_s
    resumed = pair.destination._resumed_at_s
    assert paused is not None
    assert view.blackout_ms == pytest.approx((resumed - paused) * 1000.0)
    assert view.total_s is not None
    assert view.ended
    assert view.progress.remaining_bytes == 0


@pytest.mark.parametrize("state", [_S.SWITCHOVER, _S.HANDOFF])
def test_what_the_disks_took_is_in_the_timeline_whenever_it_is_heard(state: MigrationState) -> None:
    pair = SessionPair()
    pair.run_until_state(state)
    pair.push(pair.source, v.DisksDeactivated(seconds=0.002, at_s=pair.now_s))
    assert pair.run() == COMPLETED
    (phase,) = [each for each in pair.source.view().timeline if each.name == "deactivate"]
    assert phase.seconds == pytest.approx(0.002)


def test_what_the_disks_took_is_a_part_of_the_device_state_however_late_it_is_heard() -> None:
    pair = SessionPair()
    pair.run_until_state(_S.HANDOFF)
    pair.push(pair.source, v.DisksDeactivated(seconds=10.0, at_s=pair.now_s + 1.0))
    assert pair.run() == COMPLETED
    parts = {phase.name: phase for phase in pair.source.view().timeline}
    part, whole = parts["deactivate"], parts["device state"]
    assert (part.started_at_s, part.seconds) == (whole.started_at_s, whole.seconds)


@pytest.mark.parametrize(("loaded_ms", "took_ms"), [(6.0, 6.0), (-1.0, 0.0)])
def test_what_loading_takes_is_not_told_of_the_record(loaded_ms: float, took_ms: float) -> None:
    """Or nothing, where it had loaded before its source had heard that all is sent."""
    pair = SessionPair()
    pair.silence(m.Running)
    pair.run_until_state(_S.HANDOFF)
    pair.run()
    sent_at_s = pair.source._sent_at_s
    assert sent_at_s is not None
    word = m.Running(
        token=pair.source.next_token,
        loaded_at_s=sent_at_s + loaded_ms / 1000.0,
        won_at_s=sent_at_s + 0.008,
        fenced_at_s=sent_at_s + 0.009,
        resumed_at_s=sent_at_s + 0.011,
    )
    pair.now_s = sent_at_s + 0.012
    pair.push(pair.source, v.Received(message=word))
    pair.run()
    took = {phase.name: 1000.0 * phase.seconds for phase in pair.source.view().timeline}
    assert took["load"] == pytest.approx(took_ms, abs=0.01)
    assert took["ownership record"] == pytest.approx(8.0 - took_ms, abs=0.01)


def test_a_blackout_over_two_clocks_stays_within_the_bounds_of_one() -> None:
    pair = SessionPair()
    pair.silence(m.Running)
    pair.run()
    word = pair.destination.last_word()
    assert isinstance(word, m.Running)
    skewed = m.Running(token=word.token, resumed_at_s=word.resumed_at_s - 3600.0)
    pair.push(pair.source, v.Received(message=skewed))
    assert pair.run() == COMPLETED
    blackout_ms = pair.source.blackout_ms
    assert blackout_ms is not None
    assert 0.0 <= blackout_ms < 1000.0


# --- refusal, non-convergence ---


def test_a_refusal_carries_every_reason_and_moves_nothing() -> None:
    pair = SessionPair()
    pair.fail(v.PrepareIncoming, "no memory", "no bridge br0")
    assert pair.run() == FAILED
    assert pair.source.error == "the destination refused: no memory; no bridge br0"
    assert "BeginSwitchover" not in pair.commands(SOURCE)
    assert pair.record.token == 1


def test_what_does_not_converge_is_cancelled_with_the_figures() -> None:
    request = MigrationRequest(destination="n2", mode=MigrationMode.PRECOPY)
    pair = SessionPair(request, pending=lambda number: 100_000)
    assert pair.run() == FAILED
    assert pair.source.error is not None
    assert "doesn't converge" in pair.source.error
    assert "MB/s" in pair.source.error
    assert "BeginSwitchover" not in pair.commands(SOURCE)


def test_hybrid_is_pre_copy_where_the_destination_cant_fill_in_pages() -> None:
    """And says so; what was asked to be all post-copy is refused."""
    listening = v.EngineListening(
        host="h", port=7000, secret=b"s" * 32, no_post_copy="memory of huge pages"
    )
    pair = SessionPair(pending=lambda number: 100_000, listening=listening)
    assert pair.run() == FAILED
    assert "doesn't converge" in (pair.source.error or "")
    assert ("pre-copy only", "memory of huge pages") in [
        (phase.name, phase.detail) for phase in pair.source.timeline
    ]
    request = MigrationRequest(destination="n2", mode=MigrationMode.POSTCOPY)
    refused = SessionPair(request, listening=listening)
    assert refused.run() == FAILED
    assert refused.source.error == "post-copy isn't possible: memory of huge pages"
    assert "BeginSwitchover" not in refused.commands(SOURCE)


def test_what_does_not_converge_is_forced_if_asked() -> None:
    request = MigrationRequest(
        destination="n2", mode=MigrationMode.PRECOPY, on_timeout=OnTimeout.FORCE
    )
    pair = SessionPair(request, pending=lambda number: 100_000)
    assert pair.run() == COMPLETED
    assert any("forced" in phase.detail for phase in pair.source.timeline)


@pytest.mark.parametrize("policy", OnTimeout)
def test_a_timeout_in_precopy_cancels_or_forces(policy: OnTimeout) -> None:
    request = MigrationRequest(destination="n2", mode=MigrationMode.PRECOPY, on_timeout=policy)
    # It converges, but never ends: each pass leaves a little less.
    pair = SessionPair(request, pending=lambda number: int(1e6 * 0.8**number))
    pair.run_until_state(_S.PRECOPY)
    pair.push(pair.source, v.TimerFired(name=v.TimerName.TOTAL))
    assert pair.run() == (FAILED if policy is OnTimeout.CANCEL else COMPLETED)


# --- cancel ---


@pytest.mark.parametrize("state", [_S.SETUP, _S.PRECOPY, _S.SWITCHOVER])
def test_cancel_before_the_handoff_brings_the_guest_back_here(state: MigrationState) -> None:
    pair = SessionPair()
    pair.run_until_state(state)
    before_s = pair.now_s
    assert pair.source.cancellable
    pair._events.appendleft((pair.source, v.CancelRequested()))
    pair.run()
    assert pair.source.state is _S.CANCELLED
    assert pair.destination.state in (_S.CANCELLED, _S.CREATED)
    assert pair.record.token == 1
    assert pair.now_s - before_s < 1.0
    assert "ResumeGuest" not in pair.commands(DESTINATION)
    assert "SwapRecord" not in pair.commands(SOURCE)


def test_cancel_of_a_created_one_ends_at_once() -> None:
    pair = SessionPair()
    commands = pair.source.handle(v.CancelRequested(reason="changed my mind", by="me"), 1000.0)
    assert pair.source.state is _S.CANCELLED
    assert commands[-1] == v.Finish(state=_S.CANCELLED, error="changed my mind")
    assert pair.source.view().cancelled_by == "me"


@pytest.mark.parametrize("state", [_S.HANDOFF, _S.COMPLETED])
def test_cancel_is_too_late_from_the_handoff_on(state: MigrationState) -> None:
    pair = SessionPair()
    pair.run_until_state(state)
    assert not pair.source.cancellable
    pair.push(pair.source, v.CancelRequested())
    assert pair.run() == COMPLETED


def test_a_cancel_that_races_completed_is_a_rollback_through_the_record() -> None:
    """The device state went out before the abort: only a won record continues the guest."""
    pair = SessionPair()
    pair.silence(v.ContinueSwitchover)
    pair.run()
    pair.sent = True  # The hypervisor's report of it is still on its way.
    pair.push(pair.source, v.CancelRequested())
    pair.run(timers=3)
    assert pair.source.state is _S.CANCELLED
    assert (pair.record.owner, pair.record.token) == ("n1", 2)
    assert _index(pair, v.SwapRecord) < _index(pair, v.Fence) < _index(pair, v.ResumeGuest)
    assert pair.resumed_on == [SOURCE]


def test_an_abort_is_held_back_once_the_device_state_may_be_out() -> None:
    """The destination may have the only copy until the outcome of the abort is known."""
    pair = SessionPair()
    pair.silence(v.ContinueSwitchover, v.AbortSwitchover)
    pair.run()
    pair.push(pair.source, v.CancelRequested())
    pair.run()
    assert pair.source.state is _S.CANCELLING
    assert "Abort" not in pair.messages(SOURCE)


# --- the handoff and recovery ---


def test_a_lost_running_is_found_out_from_the_record_and_the_destination() -> None:
    pair = SessionPair()
    pair.silence(m.Running)
    pair.run(timers=1)
    assert (pair.source.state, pair.destination.state) == (_S.RECOVERING, _S.COMPLETED)
    assert "DestroyGuest" not in pair.commands(SOURCE)
    pair.silent.clear()
    assert pair.run(timers=1) == COMPLETED
    assert pair.resumed_on == [DESTINATION]


def test_a_lost_commit_ends_in_a_rollback_not_in_two_guests() -> None:
    pair = SessionPair()
    pair.silence(m.Commit)
    pair.run(timers=1)
    assert pair.source.state is _S.FAILED
    assert (pair.record.owner, pair.record.token) == ("n1", 2)
    pair.push(pair.destination, v.Received(message=m.Commit()))  # Late.
    pair.run(timers=2)
    assert pair.resumed_on == [SOURCE]
    assert pair.destination.state is _S.CANCELLED


def test_a_destination_that_died_after_it_won_gives_the_guest_back() -> None:
    pair = SessionPair()
    pair.silence(v.Fence)
    pair.run()
    assert pair.record.owner == "n2"
    pair.silent.clear()
    exited = v.GuestReported(kind=DomainEventKind.EXITED, at_s=pair.now_s)
    pair.push(pair.destination, exited)
    assert pair.run(timers=1)[0] is _S.FAILED
    assert (pair.record.owner, pair.record.token) == ("n1", 3)
    assert pair.resumed_on == [SOURCE]


def test_a_destination_that_died_after_a_resume_never_gives_it_back() -> None:
    pair = SessionPair()
    pair.silence(v.ResumeGuest)
    pair.run()
    pair.push(pair.destination, v.CommandFailed(command="ResumeGuest", error="timeout"))
    pair.push(pair.destination, v.GuestReported(kind=DomainEventKind.EXITED, at_s=pair.now_s))
    pair.run()
    assert pair.destination.state is _S.FAILED
    assert pair.source.state is _S.FAILED
    assert pair.source.error == "the destination's hypervisor died in the handoff"
    assert pair.resumed_on == []


def test_a_note_that_could_not_be_written_is_not_a_resume() -> None:
    pair = SessionPair()
    pair.silence(v.Fence)
    pair.run()
    pair.failing[v.Journal] = v.CommandFailed(command="Journal", error="disk full")
    pair.silence(v.ResumeGuest)  # A failed Journal takes what stands behind it along.
    pair.push(pair.destination, v.Fenced(token=2))
    pair.push(pair.destination, v.GuestReported(kind=DomainEventKind.EXITED, at_s=pair.now_s))
    pair.run()
    assert not pair.destination.may_have_run
    assert isinstance(pair.destination.last_word(), m.Aborted)


def test_a_device_state_before_the_last_pages_is_never_committed() -> None:
    pair = SessionPair()
    pair.run_until_state(_S.SWITCHOVER)
    sent = v.GuestReported(kind=DomainEventKind.DEVICE_STATE_SENT, at_s=pair.now_s)
    pair._events.appendleft((pair.source, sent))
    pair.run()
    assert pair.source.state is _S.FAILED
    assert "Commit" not in pair.messages(SOURCE)


def test_messages_twice_change_nothing() -> None:
    pair = SessionPair()
    seen: list[tuple[Role, m.SessionMessage]] = []
    while pair._events:
        session, event = pair._events[0]
        if isinstance(event, v.Received) and (session.role, event.message) not in seen:
            seen.append((session.role, event.message))
            pair.push(session, event)
        pair._step()
    assert (pair.source.state, pair.destination.state) == COMPLETED
    for kind in (v.ConnectEngine, v.SwapRecord, v.ResumeGuest, v.BeginSwitchover):
        assert sum(isinstance(command, kind) for _, command in pair.given) == 1


@pytest.mark.parametrize("exit_first", [False, True])
def test_a_destination_that_died_right_before_its_resume_gives_the_guest_back(
    exit_first: bool,
) -> None:
    """The failed resume is certain to have run no vCPU: the source's copy is still the newest."""
    pair = SessionPair()
    pair.silence(v.ResumeGuest)
    pair.run()
    assert pair.destination.may_have_run
    pair.silent.clear()
    exited = v.GuestReported(kind=DomainEventKind.EXITED, at_s=pair.now_s)
    failed = v.CommandFailed(command="ResumeGuest", error="QEMU has ended", without_effect=True)
    for event in (exited, failed) if exit_first else (failed, exited):
        pair.push(pair.destination, event)
    pair.run(timers=1)
    assert pair.destination.state is _S.CANCELLED
    assert not pair.destination.may_have_run
    assert not entry_of(pair.destination, boot_id="boot").resuming
    assert (pair.record.owner, pair.record.token) == ("n1", 3)
    assert pair.resumed_on == [SOURCE]


def test_a_resume_without_effect_takes_an_earlier_uncertain_one_not_back() -> None:
    pair = SessionPair()
    pair.silence(v.ResumeGuest)
    pair.run()
    pair.push(pair.destination, v.CommandFailed(command="ResumeGuest", error="timeout"))
    pair.run(timers=1)  # It is tried again.
    assert pair.commands(DESTINATION).count("ResumeGuest") == 2
    failed = v.CommandFailed(command="ResumeGuest", error="QEMU has ended", without_effect=True)
    pair.push(pair.destination, failed)
    pair.push(pair.destination, v.GuestReported(kind=DomainEventKind.EXITED, at_s=pair.now_s))
    pair.run()
    assert pair.destination.state is _S.FAILED
    assert pair.source.state is _S.FAILED


def test_a_migration_has_ended_for_its_users_when_the_guest_runs_there() -> None:
    """Its own copy is still to be ended: the session goes on, and shows what will stay true."""
    pair = SessionPair()
    pair.silence(v.DestroyGuest)
    pair.run()
    shown = pair.source.view()
    assert (pair.source.state, pair.source.over) == (_S.HANDOFF, True)
    assert (shown.state, shown.progress.state, shown.ended) == (_S.COMPLETED, _S.COMPLETED, True)
    assert shown.timeline[-1].name == "handoff"
    assert not pair.source.cancellable

    pair.silent.clear()
    pair.now_s += 3.0
    failed = v.CommandFailed(command="DestroyGuest", error="it is still there")
    pair.push(pair.source, failed)
    assert pair.run(timers=1) == COMPLETED
    ended = pair.source.view()
    assert (ended.ended_at_s, ended.total_s) == (shown.ended_at_s, shown.total_s)
    assert ended.timeline[-1].name == "clean-up"
    assert ended.timeline[-1].seconds >= 3.0
