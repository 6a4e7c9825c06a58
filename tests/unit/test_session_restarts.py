"""A pair of sessions joined directly: restarts from the journal, and words after the end."""

from __future__ import annotations

import msgspec
import pytest

from migrator.journal_entry import answer_without_session, entry_of, restore
from migrator.model import (
    MigrationMode,
    MigrationProgress,
    MigrationRequest,
    MigrationState,
    NodeName,
    OwnershipRecord,
    OwnershipState,
    Role,
)
from migrator.ports import DomainEventKind
from migrator.session import messages as m
from migrator.session import vocabulary as v
from migrator.session.destination import DestinationSession
from migrator.session.source import SourceSession
from tests.unit.session_pair import (
    COMPLETED,
    DESTINATION,
    FAILED,
    GONE,
    SOURCE,
    SessionPair,
)

_S = MigrationState


# --- restart from the journal ---


def test_a_source_restarted_in_precopy_aborts_in_any_case() -> None:
    """A switchover that was begun before the restart may not show yet."""
    pair = SessionPair()
    pair.run_until_state(_S.PRECOPY)
    pair.restart(SOURCE)
    assert pair.run() == FAILED
    assert pair.commands(SOURCE)[:2] == ["InspectGuest", "AbortSwitchover"]


@pytest.mark.parametrize("state", [_S.SWITCHOVER, _S.HANDOFF])
def test_a_cancel_before_a_restored_source_recovers_ends_nothing(state: MigrationState) -> None:
    """It ended the session, as if it had never begun: nobody resumed the guest any more."""
    pair = SessionPair()
    pair.silence(m.Commit)
    pair.run_until_state(state)
    pair.restart(SOURCE)
    assert not pair.source.cancellable
    assert pair.source.handle(v.CancelRequested(), pair.now_s) == []
    assert pair.source.ended_at_s is None
    pair.run(timers=3)
    assert pair.source.state is _S.FAILED
    resumed_by = {_S.SWITCHOVER: "AbortSwitchover", _S.HANDOFF: "ResumeGuest"}
    assert resumed_by[state] in pair.commands(SOURCE)


@pytest.mark.parametrize("known", [True, False])
def test_a_dead_source_commits_only_what_is_known_to_be_out(known: bool) -> None:
    """Else the guest may have resumed by itself, and run on, after the destination had loaded."""
    pair = SessionPair()
    pair.silence(m.Commit)
    pair.run_until_state(_S.HANDOFF if known else _S.SWITCHOVER)
    pair.restart(SOURCE)
    pair.silence(v.InspectGuest)
    pair.run()
    pair.push(pair.source, GONE)
    pair.run()
    assert ("Commit" in pair.messages(SOURCE)) is known
    assert ("Abort" in pair.messages(SOURCE)) is not known


def test_a_destination_restarted_in_the_handoff_goes_on_by_itself() -> None:
    pair = SessionPair()
    pair.silence(v.SwapRecord, m.Commit)
    pair.run()
    pair.push(pair.destination, v.Received(message=m.Commit()))
    pair.run()
    assert pair.destination.state is _S.HANDOFF
    pair.silent.clear()
    pair.restart(DESTINATION)
    assert pair.run() == COMPLETED
    assert pair.resumed_on == [DESTINATION]


@pytest.mark.parametrize(("boot_id", "word"), [("boot", m.Aborted), ("another", m.Running)])
def test_after_a_reboot_an_owner_may_have_run(boot_id: str, word: type[object]) -> None:
    pair = SessionPair()
    pair.silence(v.Fence)
    pair.run()
    pair.restart(DESTINATION, boot_id=boot_id)
    pair.silence(v.InspectGuest, m.Running, m.Aborted)
    pair.run()
    pair.push(pair.destination, GONE)
    pair.run()
    assert isinstance(pair.destination.last_word(), word)


def test_a_copy_that_died_with_its_agent_says_that_the_agent_restarted() -> None:
    pair = SessionPair()
    pair.silence(m.Commit)
    pair.run()
    pair.restart(DESTINATION)
    pair.push(pair.destination, GONE)
    pair.run()
    assert "agent restarted, and its hypervisor is gone" in (pair.destination.error or "")


@pytest.mark.parametrize("owner", ["n1", "n3"])
def test_a_copy_that_the_record_moved_past_is_discarded(owner: str) -> None:
    pair = SessionPair()
    pair.silence(m.Commit)
    pair.run()
    for _ in range(3):
        pair.record = pair.record.passed_to(NodeName(owner))
    pair.run(timers=1)
    assert pair.source.state is _S.FAILED
    assert pair.commands(SOURCE)[-3:] == ["DestroyGuest", "StopEngine", "Finish"]
    assert pair.resumed_on == []


def test_a_domain_that_was_stopped_meanwhile_is_not_continued() -> None:
    pair = SessionPair()
    pair.silence(m.Commit)
    pair.run()
    record = pair.record
    pair.record = type(record)(domain="vm", token=1, owner="n1", state=OwnershipState.STOPPED)
    pair.run(timers=1)
    assert pair.source.state is _S.FAILED
    assert pair.resumed_on == []


def test_a_loaded_destination_never_gives_up_by_timeout() -> None:
    pair = SessionPair()
    pair.silence(m.Commit, m.Inquire, m.Abort, m.Pending)
    pair.run()
    pair.timers = {key: at for key, at in pair.timers.items() if key[0] is DESTINATION}
    pair.run(timers=20)
    assert pair.destination.state is _S.RECOVERING
    assert "DestroyGuest" not in pair.commands(DESTINATION)


# --- a write that may land late ---


def _dying_in_the_handoff() -> SessionPair:
    """The destination's hypervisor is gone, and what became of its compare-and-set is unknown."""
    pair = SessionPair()
    pair.silence(v.SwapRecord, m.Aborted)
    pair.run()
    assert pair.destination.state is _S.HANDOFF
    pair.push(pair.destination, v.GuestReported(kind=DomainEventKind.EXITED, at_s=pair.now_s))
    pair.push(pair.destination, v.RecordSwapped(won=None))
    return pair


def _swaps(pair: SessionPair) -> list[v.SwapRecord]:
    given = [each for role, each in pair.given if role is DESTINATION]
    return [each for each in given if isinstance(each, v.SwapRecord)]


def test_a_destination_ends_only_when_its_late_write_cannot_land_any_more() -> None:
    pair = _dying_in_the_handoff()
    pair.run()
    overtaking = _swaps(pair)[-1]
    assert overtaking.expected == overtaking.new == pair.record
    assert "Finish" not in pair.commands(DESTINATION)
    pair.silent.remove(v.SwapRecord)
    pair.push(pair.destination, v.RecordSwapped(won=None))  # That is unknown, too: once more.
    pair.run()
    assert pair.destination.state is _S.CANCELLED
    assert pair.record.owner == "n1"
    pair.run(timers=2)
    assert pair.resumed_on == [SOURCE]


def test_what_landed_late_is_passed_back() -> None:
    pair = _dying_in_the_handoff()
    pair.run()
    pair.silent.clear()
    pair.record = pair.record.passed_to(NodeName("n2"))
    pair.push(pair.destination, v.RecordSwapped(won=False))
    pair.run(timers=1)
    assert pair.destination.state is _S.CANCELLED
    assert (pair.record.owner, pair.record.token) == ("n1", 3)
    assert pair.resumed_on == [SOURCE]


@pytest.mark.parametrize(("boot_id", "committed"), [("boot", True), ("another", False)])
def test_a_restarted_destination_knows_that_a_write_may_land(boot_id: str, committed: bool) -> None:
    """The journal says so; after a reboot it may have lost it."""
    pair = SessionPair()
    pair.silence(v.SwapRecord, *(() if committed else (m.Commit,)))
    pair.run()
    pair.restart(DESTINATION, boot_id=boot_id)
    pair.silence(v.InspectGuest)
    pair.run()
    pair.push(pair.destination, GONE)
    pair.run()
    assert pair.destination.state is _S.CANCELLING
    assert [(each.expected, each.new) for each in _swaps(pair)] == [(pair.record, pair.record)]


# --- a rollback that fails ---


def _rolling_back(mode: MigrationMode = MigrationMode.PRECOPY) -> SessionPair:
    """The source won the record back; its `cont` is about to be given."""
    pair = SessionPair(MigrationRequest(destination="n2", mode=mode))
    pair.silence(v.SwapRecord, v.ResumeGuest, m.Running)
    pair.run()
    pair.push(pair.destination, v.RecordSwapped(won=None))
    pair.silent.remove(v.SwapRecord)
    pair.record = pair.record.passed_to(NodeName("n1"))
    pair.run()
    pair.push(pair.source, v.TimerFired(name=v.TimerName.HANDOFF))
    pair.run()
    assert pair.commands(SOURCE)[-3:] == ["Fence", "Journal", "ResumeGuest"]
    return pair


def test_a_source_that_died_in_its_rollback_begins_the_handoff_anew() -> None:
    pair = _rolling_back()
    assert pair.destination.state is _S.RECOVERING
    assert entry_of(pair.source, boot_id="boot").resuming
    pair.silent.clear()
    pair.silence(v.InspectGuest)
    failed = v.CommandFailed(command="ResumeGuest", error="QEMU has ended", without_effect=True)
    pair.push(pair.source, failed)
    pair.push(pair.source, GONE)
    pair.run()
    pair.silent.clear()
    assert not entry_of(pair.source, boot_id="boot").resuming
    pair.push(pair.destination, v.TimerFired(name=v.TimerName.RETRY))
    assert pair.run(timers=2) == COMPLETED
    assert (pair.record.owner, pair.record.token) == ("n2", 3)
    assert pair.resumed_on == [DESTINATION]


def test_pages_that_went_with_the_engine_in_a_rollback_are_told_as_lost() -> None:
    """The handoff begins anew, in post-copy; its guest waited for them for ever."""
    pair = _rolling_back(MigrationMode.POSTCOPY)
    pair.push(pair.source, v.EngineLost(reason="killed"))
    failed = v.CommandFailed(command="ResumeGuest", error="QEMU has ended", without_effect=True)
    pair.silence(v.InspectGuest)
    pair.push(pair.source, failed)
    pair.push(pair.source, GONE)
    pair.run()
    pair.silent.clear()
    pair.fail(v.ConnectEngine)  # There is no memory any more to configure it with.
    pair.push(pair.destination, v.TimerFired(name=v.TimerName.RETRY))
    pair.run(timers=8)
    assert (pair.source.state, pair.destination.state) == (_S.FAILED, _S.FAILED)
    assert "before the destination held every page" in (pair.destination.error or "")


def test_a_source_that_may_have_run_in_its_rollback_hands_nothing_over() -> None:
    pair = _rolling_back()
    pair.silence(v.InspectGuest)
    pair.push(pair.source, v.CommandFailed(command="ResumeGuest", error="timeout"))
    pair.push(pair.source, GONE)
    pair.run(timers=1)
    assert pair.source.state is _S.FAILED
    assert pair.source.last_word() == m.Abort(reason=pair.source.error or "", over=True)
    assert pair.resumed_on == []


def _held_up(pair: SessionPair) -> None:
    """`cont` isn't answered, and the hypervisor says that the guest didn't run."""
    pair.silence(v.InspectGuest)
    pair.push(pair.source, v.CommandFailed(command="ResumeGuest", error="timeout"))
    pair.push(pair.source, v.GuestInspected(condition=v.GuestCondition.SENT))
    pair.run()
    assert pair.source.state is _S.RECOVERING


def test_a_rollback_whose_guest_runs_late_ends_at_once() -> None:
    pair = _rolling_back()
    _held_up(pair)
    pair.push(pair.source, v.GuestReported(kind=DomainEventKind.RESUMED, at_s=pair.now_s))
    pair.run()
    assert pair.source.state is _S.FAILED
    assert "DestroyGuest" not in pair.commands(SOURCE)


def _try_again(pair: SessionPair) -> None:
    pair.push(pair.source, v.TimerFired(name=v.TimerName.RETRY))
    pair.run()


def test_a_rollback_whose_fence_fails_goes_on_while_the_record_is_its_own() -> None:
    pair = _rolling_back()
    _held_up(pair)
    pair.fail(v.Fence)
    _try_again(pair)
    assert pair.commands(SOURCE)[-2:] == ["ReadRecord", "Fence"]
    assert (pair.source.state, pair.resumed_on) == (_S.RECOVERING, [])
    pair.failing.clear()
    pair.silent.remove(v.ResumeGuest)
    _try_again(pair)
    assert (pair.source.state, pair.resumed_on) == (_S.FAILED, [SOURCE])
    assert "DestroyGuest" not in pair.commands(SOURCE)


def test_a_rollback_that_cannot_read_the_record_waits() -> None:
    pair = _rolling_back()
    _held_up(pair)
    pair.silence(v.ReadRecord)
    _try_again(pair)
    fences = pair.commands(SOURCE).count("Fence")
    pair.push(pair.source, v.RecordRead(known=False, record=None))
    pair.run()
    assert (SOURCE, v.TimerName.RETRY) in pair.timers
    assert pair.commands(SOURCE).count("Fence") == fences


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        (OwnershipState.RUNNING, "n3 took the domain over, with token 4"),
        (OwnershipState.STOPPED, "the domain was stopped or removed meanwhile"),
    ],
)
def test_a_rollback_that_another_node_overtakes_destroys_its_copy(
    state: OwnershipState, reason: str
) -> None:
    pair = _rolling_back()
    _held_up(pair)
    pair.record = OwnershipRecord(domain="vm", token=4, owner="n3", state=state)
    fences = pair.commands(SOURCE).count("Fence")
    _try_again(pair)
    assert (pair.source.state, pair.source.error) == (_S.FAILED, reason)
    assert pair.commands(SOURCE).count("Fence") == fences
    assert "DestroyGuest" in pair.commands(SOURCE)
    assert pair.resumed_on == []


@pytest.mark.parametrize(("post_copy", "ends"), [(False, _S.COMPLETED), (True, _S.FAILED)])
def test_a_post_copy_whose_guest_was_started_anew_is_no_success(
    post_copy: bool, ends: MigrationState
) -> None:
    """Its source was away; the guest waited for pages, was ended, and booted from its disk."""
    source = SessionPair().source
    source.state, source.post_copy = _S.RECOVERING, post_copy
    record = OwnershipRecord(domain="vm", token=9, owner="n2", state=OwnershipState.RUNNING)
    commands = source.handle(v.RecordRead(known=True, record=record), 10.0)
    assert any(isinstance(each, v.DestroyGuest) for each in commands)
    source.handle(v.GuestDestroyed(), 11.0)
    assert source.state is ends
    assert ("started anew since, with token 9" in (source.error or "")) is post_copy


def test_a_destination_keeps_its_copy_until_the_source_has_ended() -> None:
    pair = _rolling_back()
    pair.push(pair.destination, v.Received(message=m.Abort(reason="from long ago")))
    pair.run()
    assert "DestroyGuest" not in pair.commands(DESTINATION)
    pair.push(pair.source, v.GuestResumed(at_s=pair.now_s))
    pair.run()
    assert (pair.source.state, pair.destination.state) == (_S.FAILED, _S.CANCELLED)


# --- answers without a session ---


def test_ended_sides_do_not_answer_each_other_for_ever() -> None:
    pair = SessionPair()
    pair.run()
    entries = {role: entry_of(pair.of(role), boot_id="boot") for role in Role}
    for role, other in ((SOURCE, DESTINATION), (DESTINATION, SOURCE)):
        for message in (m.Inquire(), m.Commit(), m.Pending(state="x")):
            answer = answer_without_session(role, entries[role], message)
            if answer is not None:
                assert answer_without_session(other, entries[other], answer) is None


def test_an_unknown_migration_is_answered_so_that_the_other_side_can_end() -> None:
    assert isinstance(answer_without_session(SOURCE, None, m.Inquire()), m.Abort)
    assert isinstance(answer_without_session(DESTINATION, None, m.Commit()), m.Aborted)
    session = SessionPair().destination
    assert isinstance(session, DestinationSession)
    assert answer_without_session(DESTINATION, entry_of(session, boot_id=""), m.Inquire()) is None


def test_a_source_s_history_goes_on_after_its_agent_s_restart() -> None:
    """Each stretch of time once: what was published, until when the agent lived, its absence."""
    pair = SessionPair()
    pair.run_until_state(_S.PRECOPY)
    published = msgspec.structs.replace(
        pair.source.view(),
        progress=MigrationProgress(state=_S.PRECOPY, iteration=2, bytes_sent=5, remaining_bytes=3),
    )
    pair.run_until_state(_S.SWITCHOVER)  # Isn't published: the store's disk is the record's.
    entry = entry_of(pair.source, boot_id="boot")
    session = restore(entry, boot_id="boot")
    assert isinstance(session, SourceSession)
    alive_at_s = pair.now_s + 2.0
    session.take_up(published, alive_at_s)
    back_at_s = alive_at_s + 30.0
    session.handle(v.Recover(), back_at_s)
    told = session.timeline[len(published.timeline) :]
    assert [phase.name for phase in told] == ["precopy", "agent restart"]
    assert "it had come to switchover" in told[0].detail
    ends = [phase.started_at_s + phase.seconds for phase in session.timeline]
    assert ends[-2:] == pytest.approx([alive_at_s, back_at_s])
    assert told[1].started_at_s == pytest.approx(alive_at_s)
    progress = session.view().progress
    assert (progress.iteration, progress.bytes_sent, progress.remaining_bytes) == (2, 5, 3)
    # Engines begin to count anew.
    report = v.EngineReported(bytes_sent=4, remaining_bytes=2, throughput_bytes_per_s=1.0)
    session._note_progress(report)
    assert session.view().progress.bytes_sent == 9


def test_a_source_whose_record_is_unknown_says_that_its_agent_restarted() -> None:
    pair = SessionPair()
    pair.run_until_state(_S.PRECOPY)
    session = restore(entry_of(pair.source, boot_id="boot"), boot_id="boot")
    session.handle(v.Recover(), pair.now_s + 30.0)
    assert [phase.name for phase in session.timeline] == ["agent restart"]


def test_a_source_that_had_shown_its_end_goes_on_showing_it_and_cleans_up() -> None:
    """What was published is enough: nobody has to be asked."""
    pair = SessionPair()
    pair.silence(v.DestroyGuest)
    pair.run()
    published = pair.source.view()
    session = restore(entry_of(pair.source, boot_id="boot"), boot_id="boot")
    assert isinstance(session, SourceSession)
    session.take_up(published)
    pair.source = session
    pair.silent.clear()
    pair.given.clear()
    assert session.shown_state is _S.COMPLETED

    pair.now_s += 60.0
    pair.push(session, v.Recover())
    pair.push(session, v.Received(message=m.Running(token=2, won_at_s=0.0, resumed_at_s=0.0)))
    assert pair.run() == COMPLETED
    assert pair.commands(SOURCE)[0] == "DestroyGuest"
    assert "InspectGuest" not in pair.commands(SOURCE)
    assert session.ended_at_s == published.ended_at_s
