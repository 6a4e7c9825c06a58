"""Leave to switch over: the guest runs on until it is given, and stays where it is refused."""

from __future__ import annotations

import msgspec
import pytest

from migrator.model import MigrationMode, MigrationState, OnTimeout, PassKind, PassReport
from migrator.session import vocabulary as v
from tests.unit.session_pair import SOURCE, SessionPair

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


@pytest.mark.parametrize(
    ("mode", "on_timeout", "cut"),
    [
        (MigrationMode.HYBRID, OnTimeout.CANCEL, True),
        (MigrationMode.HYBRID, OnTimeout.FORCE, True),
        (MigrationMode.PRECOPY, OnTimeout.FORCE, False),
    ],
)
def test_only_a_pass_that_post_copy_follows_is_ended_early(
    mode: MigrationMode, on_timeout: OnTimeout, cut: bool
) -> None:
    """Where the guest is paused for what is left, a pass that is cut would lengthen that."""
    pair = SessionPair(pending=lambda number: 1_000)
    changes = {"mode": mode, "on_timeout": on_timeout}
    pair.source.request = msgspec.structs.replace(pair.request, **changes)
    pair.silence(v.RunPass)
    pair.run()
    pair.push(pair.source, v.TimerFired(name=v.TimerName.TOTAL))
    pair.run()
    ended = [each for _, each in pair.given if isinstance(each, v.EndPass)]
    assert ended == ([v.EndPass(number=1)] if cut else [])
    pair.silent.clear()
    report = PassReport(
        number=1,
        kind=PassKind.FIRST,
        seconds=1.0,
        pages=10,
        bytes_sent=40_960,
        pending_pages=90_020,
        cut_pages=90_000 if cut else 0,
    )
    pair.push(pair.source, v.PassFinished(report=report))
    pair.run()
    kinds = [PassKind.FIRST, *((PassKind.STALE, PassKind.MISSING) if cut else (PassKind.FINAL,))]
    assert passes(pair) == kinds
    if cut:
        assert pair.source.prediction is None, "half a pass tells nothing of the whole"
        assert pair.source.decisions[0].dirty_rate_bytes_per_s == 20 * 4096
        (entered,) = [each for each in pair.source.timeline if each.name == "post-copy"]
        assert entered.detail == "its time for pre-copy is over"


def test_time_that_is_over_between_passes_ends_none() -> None:
    pair = waiting(MigrationMode.HYBRID)
    pair.push(pair.source, v.TimerFired(name=v.TimerName.TOTAL))
    pair.run()
    assert "EndPass" not in pair.commands(SOURCE)


def test_a_hook_may_forbid_the_beginning() -> None:
    pair = SessionPair()
    pair._events.clear()
    pair.push(pair.source, v.LeaveRefused(reason="hook lb: not now"))
    pair.run()
    assert pair.source.state is MigrationState.FAILED
    assert pair.commands(SOURCE) == ["Finish"]
