"""A destination that has forgotten a migration, as it forgets the oldest of very many."""

from __future__ import annotations

from migrator.journal_entry import answer_without_session
from migrator.model import MigrationMode, MigrationRequest, MigrationState, NodeName, Role
from migrator.session import messages as m
from migrator.session import vocabulary as v
from tests.unit.session_pair import SessionPair

_S = MigrationState
SOURCE, DESTINATION = Role.SOURCE, Role.DESTINATION


def forgotten() -> v.Received:
    """What a destination says of a migration that its journal doesn't know."""
    answer = answer_without_session(DESTINATION, None, m.Inquire())
    assert isinstance(answer, m.Aborted)
    return v.Received(message=answer)


def test_what_it_has_forgotten_it_has_not_given_up() -> None:
    """A source that was cut off from it for a thousand migrations took its word for that, and the
    record back: the guest ran on both, and its newer copy was then ended as a stale one."""
    pair = SessionPair()
    pair.silence(m.Running, m.Inquire)
    pair.run()
    assert (pair.source.state, pair.destination.state) == (_S.HANDOFF, _S.COMPLETED)
    pair.push(pair.source, forgotten())
    pair.run()
    assert "DestroyGuest" not in pair.commands(SOURCE)
    assert pair.run(timers=1) == (_S.COMPLETED, _S.COMPLETED)
    assert "DestroyGuest" in pair.commands(SOURCE)
    assert pair.resumed_on == [DESTINATION]
    assert (pair.record.owner, pair.record.token) == ("n2", 2)


def test_a_read_that_had_begun_before_its_word_decides_nothing() -> None:
    """It passed the record back, and ended: that was on its way when the record was read."""
    pair = SessionPair()
    pair.silence(v.Fence, m.Inquire)
    pair.run()
    assert pair.record.owner == "n2"
    pair.push(pair.source, forgotten())
    pair.run()
    assert pair.source.state is _S.RECOVERING
    pair.record = pair.record.passed_to(NodeName("n1"))
    pair.silent.clear()
    pair.run(timers=1)
    assert pair.resumed_on == [SOURCE]


def test_what_it_has_refused_stays_refused() -> None:
    pair = SessionPair()
    pair.silence(v.Fence, m.Inquire, v.ReadRecord)
    pair.run()
    pair.push(pair.source, v.Received(message=m.Aborted(reason="its hypervisor died")))
    pair.push(pair.source, forgotten())
    pair.run()
    pair.silent.clear()
    pair.push(pair.source, v.RecordRead(known=True, record=pair.record))
    pair.run()
    assert pair.resumed_on == [SOURCE]
    assert (pair.record.owner, pair.record.token) == ("n1", 3)


def test_in_post_copy_it_needs_nothing_any_more() -> None:
    request = MigrationRequest(destination="n2", mode=MigrationMode.POSTCOPY)
    pair = SessionPair(request, pending=lambda number: 900_000)
    assert pair.run() == (_S.POSTCOPY, _S.POSTCOPY)
    pair.silence(m.Filled)
    pair.push(pair.destination, v.PagesComplete())
    pair.run(timers=1)
    assert pair.destination.state is _S.COMPLETED
    pair.push(pair.source, forgotten())
    pair.run()
    assert pair.source.state is _S.COMPLETED
