"""A destination that has won the guest and can't run it: who has to know, and who runs it then."""

from __future__ import annotations

import pytest

from migrator.journal_entry import entry_of, restore
from migrator.model import MigrationState, NodeName, Role
from migrator.ports import DomainEventKind
from migrator.session import messages as m
from migrator.session import vocabulary as v
from migrator.session.destination import DestinationSession
from tests.unit.session_pair import DESTINATION, SOURCE, Session, SessionPair

_S = MigrationState


class CutOff(SessionPair):
    """The destination can't reach its storage: no fence of it is confirmed."""

    cut = True
    source_dies_at_yield = False
    source_died = False

    def _perform(self, session: Session, command: v.Command) -> None:
        here = session is self.destination
        if isinstance(command, v.Fence) and here and self.cut:
            self.push(self.destination, v.CommandFailed(command="Fence", error="no answer"))
            return
        if isinstance(command, v.ResumeGuest) and not here and self.source_died:
            failed = v.CommandFailed(command="ResumeGuest", error="gone", without_effect=True)
            self.push(self.source, failed)
            return
        super()._perform(session, command)
        if isinstance(command, v.SwapRecord) and here and command.new.owner == "n1":
            self.source_died = self.source_dies_at_yield
            self.cut = not self.source_died

    def _condition(self, role: Role) -> v.GuestCondition:
        if role is SOURCE and self.source_died:
            return v.GuestCondition.GONE
        return super()._condition(role)


def test_it_gives_the_guest_back_after_a_while_to_a_source_that_has_all_of_it() -> None:
    """Else the guest would stand still for as long as one node's way to its storage is broken."""
    pair = CutOff()
    began_s = pair.now_s
    assert pair.run(timers=40) == (_S.FAILED, _S.CANCELLED)
    assert pair.resumed_on == [SOURCE]
    assert (pair.record.owner, pair.record.token) == ("n1", 3)
    assert pair.source.error == "n2 couldn't run the guest, and gave it back: no answer"
    blackout_ms, timing = pair.source.blackout_ms, pair.source.timing
    assert blackout_ms is not None
    assert timing.hand_back_s <= blackout_ms / 1000 < timing.hand_back_s + 2 * timing.retry_s_max
    assert "ResumeGuest" not in pair.commands(DESTINATION)
    assert pair.now_s > began_s + timing.hand_back_s


def test_its_copy_is_kept_and_runs_if_the_sources_dies_before_it_is_resumed() -> None:
    pair = CutOff()
    pair.source_dies_at_yield = True
    assert pair.run(timers=60)[1] is _S.COMPLETED
    assert pair.resumed_on == [DESTINATION]
    assert (pair.record.owner, pair.record.token) == ("n2", 4)
    assert "DestroyGuest" not in pair.commands(DESTINATION)


def yielding(pair: CutOff) -> None:
    """The destination is about to give the record back, and its write isn't answered."""
    pair.run(timers=1)
    while not pair.destination.yielding:
        pair.silent = {v.SwapRecord} if pair.record.owner == "n2" else set()
        pair.run(timers=1)
    assert pair.record.owner == "n2"


def test_what_it_has_tried_to_give_back_it_doesnt_run_even_after_a_restart() -> None:
    """The write may land late: the source would run the guest, too."""
    pair = CutOff()
    yielding(pair)
    pair.cut = False
    pair.push(pair.destination, v.Fenced(token=2))
    pair.run()
    assert "ResumeGuest" not in pair.commands(DESTINATION)
    restored = restore(entry_of(pair.destination, boot_id="b"), boot_id="b")
    assert isinstance(restored, DestinationSession)
    pair.destination = restored
    pair.silent = set()
    pair.push(restored, v.Recover())
    assert pair.run(timers=20) == (_S.FAILED, _S.CANCELLED)
    assert pair.resumed_on == [SOURCE]
    assert "ResumeGuest" not in pair.commands(DESTINATION)


def test_a_write_that_lands_late_is_recognized() -> None:
    pair = CutOff()
    yielding(pair)
    pair.push(pair.destination, v.RecordSwapped(won=None))
    pair.record = pair.record.passed_to(NodeName("n1"))
    pair.silent = set()
    assert pair.run(timers=20) == (_S.FAILED, _S.CANCELLED)
    assert pair.resumed_on == [SOURCE]
    assert (pair.record.owner, pair.record.token) == ("n1", 3)


def test_a_note_that_cannot_be_written_calls_it_off() -> None:
    pair = CutOff()
    pair.run(timers=1)
    pair.failing[v.Journal] = v.CommandFailed(command="Journal", error="disk full")
    pair.silence(v.SwapRecord)  # A failed Journal takes what stands behind it along.
    pair.run(timers=20)
    assert not pair.destination.yielding
    assert pair.record.owner == "n2"
    pair.failing.clear()
    pair.silent = set()
    pair.run(timers=20)
    assert pair.resumed_on == [SOURCE]


def test_meanwhile_the_migration_says_what_it_waits_for() -> None:
    pair = CutOff()
    pair.run(timers=6)
    assert pair.source.state is _S.RECOVERING
    assert pair.source.view().error == "the guest stands still: n2 can't run it yet: no answer"


def test_it_goes_on_trying_where_the_source_has_lost_its_copy() -> None:
    """Its own is the only one then."""
    pair = CutOff()
    pair.run(timers=2)
    pair.push(pair.source, v.GuestReported(kind=DomainEventKind.EXITED, at_s=pair.now_s))
    pair._condition = lambda role: (  # type: ignore[method-assign]
        v.GuestCondition.GONE if role is SOURCE else v.GuestCondition.LOADED
    )
    pair.run(timers=60)
    assert pair.now_s > 1000.0 + 3 * pair.source.timing.hand_back_s
    assert "DestroyGuest" not in pair.commands(DESTINATION)
    assert pair.record.owner == "n2"
    fences = pair.commands(DESTINATION).count("Fence")
    assert fences > 5


def won(pair: SessionPair) -> None:
    """The destination has, long ago, and its only fence hasn't been answered."""
    pair.silence(v.Fence, m.Inquire)
    pair.run()
    assert pair.record.owner == "n2"
    pair.now_s += 10 * pair.source.timing.hand_back_s


@pytest.mark.parametrize("answered", [False, True])
def test_it_never_gives_back_what_may_run_or_what_nothing_is_wrong_with(answered: bool) -> None:
    pair = SessionPair()
    pair.silence(v.ResumeGuest)
    won(pair)
    if answered:
        pair.push(pair.destination, v.CommandFailed(command="Fence", error="no answer"))
        pair.push(pair.destination, v.Fenced(token=2))
        pair.run()
        assert "ResumeGuest" in pair.commands(DESTINATION)
    pair.push(pair.destination, v.Received(message=m.Inquire(whole=True)))
    pair.run()
    assert "DestroyGuest" not in pair.commands(DESTINATION)
    assert pair.record.owner == "n2"


def test_an_older_source_doesnt_say_that_it_has_all_of_it() -> None:
    pair = SessionPair()
    won(pair)
    pair.push(pair.destination, v.CommandFailed(command="Fence", error="no answer"))
    pair.push(pair.destination, v.Received(message=m.Inquire()))
    pair.run()
    assert "DestroyGuest" not in pair.commands(DESTINATION)


def test_an_older_note_that_fails_doesnt_call_it_off() -> None:
    """The note of a resume that had failed was still being written when the record was given back,
    and failed, too. So the giving back was taken for one that hadn't been tried, and its success
    for the destination's own: both sides had the guest, by records that said otherwise."""
    pair = SessionPair()
    failed = v.CommandFailed(command="ResumeGuest", error="no answer", without_effect=True)
    pair.failing[v.ResumeGuest] = failed
    pair.silence(m.Inquire)
    pair.run()
    assert pair.commands(DESTINATION)[-2:] == ["ResumeGuest", "Journal"]
    pair.now_s += 2 * pair.source.timing.hand_back_s
    pair.silence(v.SwapRecord)  # It waits for its own note.
    pair.push(pair.destination, v.Received(message=m.Inquire(whole=True)))
    pair.push(pair.destination, v.CommandFailed(command="Journal", error="disk full"))
    pair.run()
    assert entry_of(pair.destination, boot_id="b").yielding
    pair.record = pair.record.passed_to(NodeName("n1"))
    pair.failing.clear()
    pair.silent.clear()
    pair.push(pair.destination, v.RecordSwapped(won=True))
    assert pair.run(timers=20) == (_S.FAILED, _S.CANCELLED)
    assert pair.resumed_on == [SOURCE]
    assert pair.commands(DESTINATION).count("ResumeGuest") == 1
