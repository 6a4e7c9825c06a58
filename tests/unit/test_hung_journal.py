"""A local disk that hangs, and with it the journal, while a guest stands still for its rollback."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from migrator.journal import MigrationJournal
from migrator.journal_entry import JournalEntry, entry_of, restore
from migrator.model import MigrationState, Role
from migrator.session import messages as m
from migrator.session import vocabulary as v
from migrator.session.source import SourceSession
from tests.unit.migration_world import WEB, check_back_home, migration_world
from tests.unit.session_pair import Session, SessionPair

_S = MigrationState
SOURCE, DESTINATION = Role.SOURCE, Role.DESTINATION
HANGS = v.CommandFailed(command="Journal", error="/var/lib/ferry hangs", dropped=(v.ResumeGuest(),))


class HangingDisk(SessionPair):
    """The source's journal can't be written before its `cont`; no Commit arrives."""

    def __init__(self) -> None:
        super().__init__()
        self.silence(m.Commit)
        self._held_back = False
        self.source_died = False

    def _condition(self, role: Role) -> v.GuestCondition:
        if role is SOURCE and self.source_died:
            return v.GuestCondition.GONE
        return super()._condition(role)

    def _perform(self, session: Session, command: v.Command) -> None:
        if isinstance(command, v.Journal) and command.resuming and session is self.source:
            self._held_back = True  # What stands behind it isn't performed.
            self.push(session, HANGS)
        elif isinstance(command, v.ResumeGuest) and self._held_back:
            self._held_back = False
        else:
            super()._perform(session, command)


def given(pair: SessionPair) -> list[str]:
    """What the source's rollback consists of. Behind a note that failed nothing is performed."""
    steps = ("SwapRecord", "Fence", "Journal", "ResumeGuest")
    names = [name for name in pair.commands(SOURCE) if name in steps]
    return names[names.index("SwapRecord") :]


def saying(pair: HangingDisk) -> None:
    """The record is won back, and is about to say that the guest is resumed; nobody answers."""
    pair.run()
    pair.push(pair.source, v.TimerFired(name=v.TimerName.HANDOFF))
    while not pair.source._saying:
        pair._step()
        if pair.record.token == 2:
            pair.silence(v.SwapRecord)
    pair.run()
    assert (pair.record.owner, pair.record.token) == ("n1", 2)
    assert pair.resumed_on == []


def restarted(pair: SessionPair) -> None:
    """The source's agent; its journal has nothing of the rollback."""
    entry = entry_of(pair.source, boot_id="boot")
    assert not entry.resuming
    session = restore(entry, boot_id="boot")
    assert isinstance(session, SourceSession)
    pair.source = session
    pair._events.clear()
    pair.timers = {key: at for key, at in pair.timers.items() if key[0] is DESTINATION}
    pair.given.clear()
    pair.silent.clear()
    pair.silence(m.Commit)
    pair.push(session, v.Recover())


def test_the_record_says_what_the_journal_can_not() -> None:
    pair = HangingDisk()
    assert pair.run(timers=3) == (_S.FAILED, _S.CANCELLED)
    assert given(pair) == [
        *("SwapRecord", "Fence", "Journal", "ResumeGuest"),
        *("SwapRecord", "Fence", "ResumeGuest"),
    ]
    assert pair.resumed_on == [SOURCE]
    assert (pair.record.owner, pair.record.token) == ("n1", 5)
    details = {phase.name: phase.detail for phase in pair.source.timeline}
    assert details["rollback"] == "the record notes it: /var/lib/ferry hangs"


def test_nothing_is_resumed_before_the_record_is_known_to_say_it() -> None:
    """What was tried may land late: the guest would run under a token that isn't the newest."""
    pair = HangingDisk()
    saying(pair)
    pair.push(pair.source, v.TimerFired(name=v.TimerName.RETRY))
    pair.push(pair.source, v.Fenced(token=2))
    pair.push(pair.source, v.RecordSwapped(won=None))
    pair.run()
    assert pair.resumed_on == []
    pair.record = pair.record.said_resuming()
    pair.silent.discard(v.SwapRecord)
    pair.push(pair.source, v.RecordSwapped(won=None))
    pair.run()
    assert pair.resumed_on == [SOURCE]
    assert pair.record.token == 5


def test_the_next_agent_makes_the_record_say_it_before_it_goes_on() -> None:
    """It can't know what the last one tried."""
    pair = HangingDisk()
    saying(pair)
    restarted(pair)
    pair.run(timers=3)
    assert pair.resumed_on == [SOURCE]
    assert given(pair)[-1] == "ResumeGuest"
    assert "Journal" not in given(pair)
    assert pair.record.token == 5


def test_what_the_record_says_is_gone_on_with_after_a_restart() -> None:
    """The agent died before its `cont`: the source's copy is still there, and the newest."""
    pair = HangingDisk()
    saying(pair)
    pair.record = pair.record.said_resuming()
    restarted(pair)
    pair.run(timers=3)
    assert (pair.source.state, pair.destination.state) == (_S.FAILED, _S.CANCELLED)
    assert pair.resumed_on == [SOURCE]
    assert pair.record.token == 5


def test_a_guest_that_may_have_run_is_not_handed_over() -> None:
    pair = HangingDisk()
    saying(pair)
    pair.record = pair.record.said_resuming()
    restarted(pair)
    pair.source_died = True
    pair.silent.clear()
    pair.run(timers=1)
    assert "Commit" not in pair.messages(SOURCE)
    assert pair.source.last_word() == m.Abort(reason=pair.source.error or "", over=True)
    assert pair.resumed_on == []


@pytest.mark.parametrize("told_first", [False, True])
def test_a_hypervisor_that_dies_before_its_resume_begins_the_handoff_anew(told_first: bool) -> None:
    """The destination, which has heard what the record says, has kept its copy."""
    pair = HangingDisk()
    pair.silence(v.ResumeGuest)
    pair.run(timers=1)
    assert pair.record.token == 5
    if told_first:
        pair.push(pair.destination, v.TimerFired(name=v.TimerName.PEER))
        pair.run()
        assert pair.destination.state is _S.RECOVERING
        assert "DestroyGuest" not in pair.commands(DESTINATION)
    pair.silent.clear()
    pair.source_died = True
    died = v.CommandFailed(command="ResumeGuest", error="QEMU has ended", without_effect=True)
    pair.push(pair.source, died)
    assert pair.run(timers=3) == (_S.COMPLETED, _S.COMPLETED)
    assert pair.resumed_on == [DESTINATION]
    assert (pair.record.owner, pair.record.token) == ("n2", 6)


@pytest.mark.parametrize(
    "word", [m.Farewell(), m.Lost(reason="over"), m.Abort(reason="over", over=True)]
)
def test_a_copy_that_was_kept_goes_with_the_sources_end(word: m.SessionMessage) -> None:
    """What the record says may be another's doing by now: the source knows."""
    pair = HangingDisk()
    saying(pair)
    pair.record = pair.record.said_resuming()
    pair.push(pair.destination, v.TimerFired(name=v.TimerName.PEER))
    assert pair.run()[1] is _S.RECOVERING
    pair.push(pair.destination, v.Received(message=word))
    assert pair.run()[1] is _S.CANCELLED


async def test_a_guest_is_back_within_seconds_though_the_disk_hangs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both nodes' do, from the handoff on: the destination doesn't take the guest."""
    back = threading.Event()
    write = MigrationJournal._write

    def hang(journal: MigrationJournal, entry: JournalEntry, packed: bytes, durable: bool) -> None:
        if entry.state not in (_S.SETUP, _S.SWITCHOVER):
            back.wait(60.0)
        write(journal, entry, packed, durable)

    monkeypatch.setattr(MigrationJournal, "_write", hang)
    async with migration_world(tmp_path, monkeypatch) as world:
        try:
            began = await world.migrate()
            session = world.a.manager._runners[began.id].session
            assert isinstance(session, SourceSession)
            await world.until(lambda: session.state is _S.HANDOFF)
            await world.until(lambda: session.blackout_ms is not None)
            assert world.running() == ["a"]
            assert not back.is_set()
            record = await world.a.node.ownership.read(WEB)
            assert record is not None
            assert (record.owner, record.token) == ("a", 5)
            assert session.blackout_ms is not None
            assert session.blackout_ms < 8_000.0
        finally:
            back.set()
        ended = await check_back_home(world, began, _S.FAILED)
        assert "the record notes it" in str(ended.timeline)
