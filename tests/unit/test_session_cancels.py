"""A cancel that is under way while its source's agent ends, on a pair of sessions."""

from __future__ import annotations

import msgspec
import pytest

from migrator.journal_entry import entry_of
from migrator.model import MigrationState
from migrator.session import vocabulary as v
from tests.unit.session_pair import GONE, SOURCE, SessionPair

_S = MigrationState


def _cancelling(state: MigrationState) -> SessionPair:
    """Cancelled in `state`; nothing of what was asked for is done yet."""
    pair = SessionPair()
    pair.run_until_state(state)
    pair.source.handle(v.CancelRequested(reason="cancelled by me", by="me"), pair.now_s)
    assert pair.source.state is _S.CANCELLING
    return pair


@pytest.mark.parametrize("state", [_S.SETUP, _S.PRECOPY, _S.SWITCHOVER])
@pytest.mark.parametrize("sent", [False, True])
def test_a_cancel_outlives_the_agent(state: MigrationState, sent: bool) -> None:
    """It ended as failed, for the agent had restarted. `sent`: it came to be a rollback."""
    pair = _cancelling(state)
    pair.sent = sent
    pair.restart(SOURCE)
    pair.run(timers=3)
    assert pair.source.state is _S.CANCELLED
    view = pair.source.view()
    assert (view.cancelled_by, view.error) == ("me", "cancelled by me")
    assert pair.resumed_on == ([SOURCE] if sent else [])


def test_a_cancel_that_only_its_record_knows_of_outlives_the_agent() -> None:
    """The journal's disk was full."""
    pair = SessionPair()
    pair.run_until_state(_S.PRECOPY)
    before = entry_of(pair.source, boot_id="boot")
    pair.source.handle(v.CancelRequested(by="me"), pair.now_s)
    shown = pair.source.view()
    pair.restart(SOURCE, entry=before)
    pair.source.take_up(shown)
    pair.run()
    assert (pair.source.state, pair.source.cancelled_by) == (_S.CANCELLED, "me")


def test_a_cancel_is_not_forgotten_for_a_record_that_is_behind() -> None:
    pair = _cancelling(_S.PRECOPY)
    behind = msgspec.structs.replace(pair.source.view(), cancelled_by="")
    pair.restart(SOURCE)
    pair.source.take_up(behind)
    assert pair.source.view().cancelled_by == "me"


@pytest.mark.parametrize(("state", "asks"), [(_S.PRECOPY, False), (_S.SWITCHOVER, True)])
def test_a_guest_that_dies_in_a_cancel_is_missed_by_its_source_alone(
    state: MigrationState, asks: bool
) -> None:
    """Unless it may have been sent: also after a restart no other node is waited for."""
    pair = _cancelling(state)
    pair.restart(SOURCE)
    pair.silence(v.InspectGuest)
    pair.run()
    pair.push(pair.source, GONE)
    pair.silence(v.ReadRecord)
    pair.run()
    assert ("ReadRecord" in pair.commands(SOURCE)) is asks
    assert pair.source.state is (_S.RECOVERING if asks else _S.FAILED)


def test_a_cancel_is_noted_last_and_holds_nothing_up() -> None:
    pair = SessionPair()
    pair.run_until_state(_S.SWITCHOVER)
    commands = pair.source.handle(v.CancelRequested(), pair.now_s)
    assert commands[-1] == v.Journal(state=_S.CANCELLING, durable=False)
    failed = v.CommandFailed(command="Journal", error="disk full")
    assert pair.source.handle(failed, pair.now_s) == []
    assert pair.source.state is _S.CANCELLING


def test_a_hypervisor_that_answers_again_after_long_has_its_guest_back_at_once() -> None:
    """It stood still for up to five seconds more, until it was asked again."""
    pair = SessionPair()
    pair.run_until_state(_S.SWITCHOVER)
    pair.fail(v.AbortSwitchover)
    pair.push(pair.source, v.CancelRequested(by="me"))
    assert pair.run(timers=12)[0] == _S.CANCELLING
    del pair.failing[v.AbortSwitchover]
    answers_at_s = pair.now_s
    assert pair.run(timers=1)[0] == _S.CANCELLED
    assert pair.now_s - answers_at_s < 1.0
