"""Leave to switch over: the guest runs on until it is given, and stays where it is refused."""

from __future__ import annotations

import msgspec
import pytest

from migrator.model import MigrationMode, MigrationState, PassKind, Role
from migrator.session import vocabulary as v
from tests.unit.session_pair import SessionPair

SOURCE = Role.SOURCE
ENDED_AWAY = (MigrationState.COMPLETED, MigrationState.COMPLETED)


def passes(pair: SessionPair) -> list[PassKind]:
    return [each.kind for _, each in pair.given if isinstance(each, v.RunPass)]


def waiting(mode: MigrationMode = MigrationMode.PRECOPY) -> SessionPair:
    """A pair whose source waits for leave."""
    pair = SessionPair()
    pair.source.request = msgspec.structs.replace(pair.request, mode=mode)
    pair.silence(v.AskLeave)
    pair.run()
    assert pair.source.state is MigrationState.PRECOPY
    assert pair.commands(SOURCE)[-1] == "AskLeave"
    return pair


def test_nothing_is_paused_without_leave() -> None:
    pair = waiting()
    assert "BeginSwitchover" not in pair.commands(SOURCE)
    assert passes(pair) == [PassKind.FIRST]


def test_leave_at_once_costs_no_pass() -> None:
    pair = waiting()
    pair.push(pair.source, v.LeaveGiven(detail="lb done"))
    assert pair.run() == ENDED_AWAY
    assert passes(pair) == [PassKind.FIRST, PassKind.FINAL]
    assert any(
        phase.name == "leave" and phase.detail == "lb done" for phase in pair.source.timeline
    )


def test_leave_that_came_late_is_followed_by_another_pass() -> None:
    pair = waiting()
    pair.now_s += 20.0
    pair.push(pair.source, v.LeaveGiven())
    assert pair.run() == ENDED_AWAY
    assert passes(pair) == [PassKind.FIRST, PassKind.DIRTY, PassKind.FINAL]
    assert pair.commands(SOURCE).count("AskLeave") == 1


def test_a_refusal_ends_the_migration_and_the_guest_stays() -> None:
    pair = waiting()
    pair.push(pair.source, v.LeaveRefused(reason="hook lb: black friday"))
    states = pair.run()
    assert states == (MigrationState.FAILED, MigrationState.CANCELLED)
    assert pair.source.error == "hook lb: black friday"
    assert pair.record.owner == "n1"
    assert pair.resumed_on == []


def test_it_can_be_cancelled_while_it_waits_and_late_leave_is_ignored() -> None:
    pair = waiting()
    pair.push(pair.source, v.CancelRequested())
    pair.push(pair.source, v.LeaveGiven())
    assert pair.run()[0] is MigrationState.CANCELLED
    assert "BeginSwitchover" not in pair.commands(SOURCE)


def test_the_time_is_over_while_it_waits() -> None:
    pair = waiting()
    pair.push(pair.source, v.TimerFired(name=v.TimerName.TOTAL))
    assert pair.run()[0] is MigrationState.FAILED
    assert pair.record.owner == "n1"


@pytest.mark.parametrize("seconds", [0.0, 20.0])
def test_post_copy_asks_too(seconds: float) -> None:
    pair = waiting(MigrationMode.POSTCOPY)
    assert passes(pair) == []
    pair.now_s += seconds
    pair.push(pair.source, v.LeaveGiven())
    pair.run()
    assert passes(pair)[0] is PassKind.STALE


def test_a_hook_may_forbid_the_beginning() -> None:
    pair = SessionPair()
    pair._events.clear()
    pair.push(pair.source, v.LeaveRefused(reason="hook lb: not now"))
    pair.run()
    assert pair.source.state is MigrationState.FAILED
    assert pair.commands(SOURCE) == ["Finish"]
