"""Sessions, and a store that isn't what it was: restored from an older copy, or full."""

from __future__ import annotations

from typing import TypeVar

import pytest

from migrator.journal_entry import entry_of, restore
from migrator.model import (
    MigrationMode,
    MigrationRequest,
    MigrationState,
    NodeName,
    OwnershipRecord,
    OwnershipState,
    Role,
)
from migrator.session import messages as m
from migrator.session import vocabulary as v
from migrator.session.destination import DestinationSession
from migrator.session.source import SourceSession
from tests.unit.session_pair import Session, SessionPair

_S = MigrationState
P = TypeVar("P", bound=SessionPair)
SOURCE, DESTINATION = Role.SOURCE, Role.DESTINATION
TOKEN = 5
OLDER = OwnershipRecord(domain="vm", token=3, owner="n3", state=OwnershipState.RUNNING)
STOPPED = OwnershipRecord(domain="vm", token=2, owner="n2", state=OwnershipState.STOPPED)
HAD = f"and had it under {TOKEN}: it was restored from an older copy, was begun anew or is another"


def handed_off(pair_of: type[P]) -> P:
    """The device state is out and loaded; no Commit has come, and nobody answers any more."""
    request = MigrationRequest(destination="n2", mode=MigrationMode.PRECOPY)
    pair = pair_of(request, token=TOKEN, pending=lambda number: 10)
    pair.silence(m.Commit, m.Inquire, m.Pending, m.Abort)
    pair.run()
    assert (pair.source.state, pair.destination.state) == (_S.HANDOFF, _S.SWITCHOVER)
    return pair


def restart(pair: SessionPair, role: Role) -> None:
    """Its agent. What it had asked for is not answered any more."""
    session = restore(entry_of(pair.of(role), boot_id="boot"), boot_id="boot")
    if isinstance(session, SourceSession):
        pair.source = session
    else:
        pair.destination = session
    pair._events.clear()
    pair.timers = {key: at_s for key, at_s in pair.timers.items() if key[0] is not role}
    pair.push(session, v.Recover())


def destroyed(pair: SessionPair) -> bool:
    return "DestroyGuest" in pair.commands(SOURCE) + pair.commands(DESTINATION)


class Wiped(SessionPair):
    """The store was begun anew: it has no record of anything."""

    wiped = False

    def _answers(self, session: Session, command: v.Command) -> list[v.Event]:
        if self.wiped and isinstance(command, v.ReadRecord):
            return [v.RecordRead(known=True, record=None)]
        if self.wiped and isinstance(command, v.SwapRecord):
            return [v.RecordSwapped(won=False)]
        return super()._answers(session, command)


@pytest.mark.parametrize("older", [OLDER, STOPPED, None])
@pytest.mark.parametrize("restarted", [None, SOURCE, DESTINATION])
def test_both_copies_are_kept_while_the_store_is_an_older_one(
    older: OwnershipRecord | None, restarted: Role | None
) -> None:
    """Both were ended: by that record the domain ran elsewhere, or was stopped, or deleted."""
    pair = handed_off(Wiped)
    newest, pair.record = pair.record, older or pair.record
    pair.wiped = older is None
    if restarted is not None:
        restart(pair, restarted)
    pair.run(timers=30)
    assert (pair.source.state, pair.destination.state) == (_S.RECOVERING, _S.RECOVERING)
    assert not destroyed(pair)
    said = pair.source.view().error
    has = "no record of domain vm" if older is None else f"domain vm under token {older.token}"
    assert said is not None
    assert said.startswith(f"the store has {has}, {HAD}")
    pair.record, pair.wiped = newest, False
    pair.silent.clear()
    pair.run(timers=12)
    assert len(pair.resumed_on) == 1
    assert pair.record.token == TOKEN + 1
    assert "restored" not in (pair.source.view().error or "")


@pytest.mark.parametrize("wiped", [False, True])
def test_an_older_store_that_stays_is_believed_in_the_end(wiped: bool) -> None:
    """Else nobody could ever do anything with the domain on these nodes."""
    pair = handed_off(Wiped)
    pair.record, pair.wiped = OLDER, wiped
    pair.run(timers=30)
    assert not destroyed(pair)
    pair.now_s += pair.source.timing.older_store_s
    pair.run(timers=8)
    assert pair.source.state is _S.FAILED
    assert pair.destination.state is _S.CANCELLED
    assert pair.resumed_on == []


def test_a_rollback_that_was_won_is_not_undone_by_an_older_store() -> None:
    pair = handed_off(SessionPair)
    pair.silence(v.Fence)
    pair.run(timers=1)
    won = pair.record
    assert (won.owner, won.token) == ("n1", TOKEN + 1)
    pair.record = OwnershipRecord(
        domain="vm", token=TOKEN, owner="n1", state=OwnershipState.RUNNING
    )
    pair.push(pair.source, v.CommandFailed(command="Fence", error="no answer"))
    pair.run(timers=4)
    assert not destroyed(pair)
    pair.record = won
    pair.silent.clear()
    pair.run(timers=6)
    assert pair.resumed_on == [SOURCE]


def test_pages_are_served_on_while_the_store_is_an_older_one() -> None:
    """By that record the guest was still at the source: its copy was ended, and the guest lost."""
    request = MigrationRequest(destination="n2", mode=MigrationMode.POSTCOPY)
    pair = SessionPair(request, token=TOKEN, pending=lambda number: 900_000)
    assert pair.run() == (_S.POSTCOPY, _S.POSTCOPY)
    won = pair.record
    pair.record = OwnershipRecord(
        domain="vm", token=TOKEN, owner="n1", state=OwnershipState.RUNNING
    )
    pair.run(timers=6)
    assert not destroyed(pair)
    pair.record = won
    pair.push(pair.destination, v.PagesComplete())
    assert pair.run(timers=4) == (_S.COMPLETED, _S.COMPLETED)


def test_an_answer_that_was_given_before_the_source_took_its_guest_back_says_nothing() -> None:
    """It won the record back, died, and said Commit anew: a read of the destination's, whose answer
    came after that, had it give up the only copy."""
    pair = handed_off(SessionPair)
    restart(pair, DESTINATION)
    pair.silence(v.ReadRecord)
    pair.run()
    before = pair.record
    pair.record = before.passed_to(NodeName("n1"))
    again = m.Commit(token=pair.record.token)
    pair.push(pair.destination, v.Received(message=again))
    pair.run()
    pair.push(pair.destination, v.RecordRead(known=True, record=before))
    pair.silent.discard(v.ReadRecord)
    pair.run(timers=1)
    assert not destroyed(pair)
    assert pair.resumed_on == [DESTINATION]
    assert (pair.record.owner, pair.record.token) == ("n2", TOKEN + 2)


class Full(SessionPair):
    """The store answers reads, and refuses writes at once."""

    full = True
    refused = 0

    def _answers(self, session: Session, command: v.Command) -> list[v.Event]:
        if isinstance(command, v.SwapRecord) and self.full:
            self.refused += 1
            assert self.refused < 100, "it is asked without a pause"
            return [v.RecordSwapped(won=None)]
        return super()._answers(session, command)


@pytest.mark.parametrize("who", [SOURCE, DESTINATION])
def test_a_store_that_takes_no_writes_is_asked_with_pauses(who: Role) -> None:
    """etcd without room left: agents asked it, and filled their logs, as fast as it refused."""
    pair = Full()
    lost = m.Commit if who is SOURCE else m.Running
    pair.silence(lost)
    pair.run(timers=12)
    assert pair.refused < 30
    assert not destroyed(pair)
    pair.full = False
    pair.silent.clear()
    pair.run(timers=12)
    assert len(pair.resumed_on) == 1
    assert pair.record.owner == ("n1" if pair.resumed_on == [SOURCE] else "n2")


def test_one_answer_that_was_lost_costs_no_pause() -> None:
    pair = Full()
    pair.silence(v.SwapRecord)
    pair.run()
    pair.full = False
    pair.push(pair.destination, v.RecordSwapped(won=None))
    pair.silent.clear()
    assert pair.run() == (_S.COMPLETED, _S.COMPLETED)


def test_what_was_won_and_is_not_there_any_more_is_not_given_back_for_ever() -> None:
    """The destination gives up what it had won, in a store that has gone back to before."""
    pair = SessionPair(token=TOKEN)
    pair.silence(v.Fence)
    pair.run()
    before = OwnershipRecord(domain="vm", token=TOKEN, owner="n1", state=OwnershipState.RUNNING)
    pair.record = before
    session: DestinationSession = pair.destination
    session._give_up("its hypervisor died")
    commands, session._commands = session._commands, []
    assert any(isinstance(each, v.DestroyGuest) for each in commands)
    given = session.handle(v.GuestDestroyed(), pair.now_s)
    assert [each.new.owner for each in given if isinstance(each, v.SwapRecord)] == ["n1"]
    session.handle(v.RecordSwapped(won=False), pair.now_s)
    given = session.handle(v.RecordRead(known=True, record=before), pair.now_s)
    assert v.SwapRecord(expected=before, new=before) in given
    session.handle(v.RecordSwapped(won=True), pair.now_s)
    assert session.state is _S.CANCELLED
