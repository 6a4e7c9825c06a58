"""Leave to switch over: the guest runs on until it is given, and stays where it is refused."""

from __future__ import annotations

import msgspec
import pytest

from migrator.model import (
    EngineKind,
    MigrationMode,
    MigrationState,
    OnTimeout,
    PassKind,
    PassReport,
)
from migrator.ports import AbortOutcome, DomainEventKind
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
    told = [each.seconds for each in pair.source.timeline if each.name == "leave"]
    assert told == [pytest.approx(20.0, abs=0.1)], "the store, say, was away: no hook tells of it"


def test_a_refusal_ends_the_migration_and_the_guest_stays() -> None:
    pair = waiting()
    pair.push(pair.source, v.LeaveRefused(reason="hook lb: black friday"))
    states = pair.run()
    assert states == (MigrationState.FAILED, MigrationState.CANCELLED)
    assert pair.source.error == "hook lb: black friday"
    assert pair.record.owner == "n1"
    assert pair.resumed_on == []


# --- a hypervisor that moves the memory itself: it may stop the guest any time ---


def asking_hooks() -> SessionPair:
    pair = SessionPair()
    pair.source.request = msgspec.structs.replace(
        pair.request, engine=EngineKind.NATIVE, mode=MigrationMode.PRECOPY
    )
    pair.silence(v.AskLeave)
    pair.run()
    return pair


def parts(pair: SessionPair) -> list[v.LeavePart]:
    return [each.part for _, each in pair.given if isinstance(each, v.AskLeave)]


def test_its_hooks_are_asked_before_any_memory_travels_and_the_rest_when_it_is_across() -> None:
    pair = asking_hooks()
    assert parts(pair) == [v.LeavePart.HOOKS]
    assert passes(pair) == []
    pair.now_s += 20.0
    pair.push(pair.source, v.LeaveGiven(detail="lb done"))
    pair.run()
    assert parts(pair) == [v.LeavePart.HOOKS, v.LeavePart.REST]
    assert passes(pair) == [PassKind.FIRST]
    pair.push(pair.source, v.LeaveGiven())
    assert pair.run() == ENDED_AWAY
    assert passes(pair) == [PassKind.FIRST, PassKind.FINAL], "the hooks' time costs no pass"
    assert [each.detail for each in pair.source.timeline if each.name == "leave"] == ["lb done"]


def test_hooks_that_forbid_it_end_it_before_any_memory_travels() -> None:
    pair = asking_hooks()
    pair.push(pair.source, v.LeaveRefused(reason="hook lb: black friday"))
    assert pair.run() == (MigrationState.FAILED, MigrationState.CANCELLED)
    assert passes(pair) == []
    assert pair.source.error == "hook lb: black friday"


@pytest.mark.parametrize("on_timeout", OnTimeout)
def test_hooks_that_take_all_of_its_time_end_it_too(on_timeout: OnTimeout) -> None:
    """Forced after one pass the guest would stand still for all that it wrote meanwhile."""
    pair = asking_hooks()
    pair.source.request = msgspec.structs.replace(pair.source.request, on_timeout=on_timeout)
    pair.push(pair.source, v.TimerFired(name=v.TimerName.TOTAL))
    assert pair.run()[0] is MigrationState.FAILED
    assert "its hooks took all of it" in (pair.source.error or "")
    assert passes(pair) == []


def test_a_page_engine_asks_all_at_once() -> None:
    assert parts(waiting()) == [v.LeavePart.ALL]


# --- a guest that its hypervisor has stopped by itself ---


def halted() -> SessionPair:
    """As `waiting`; next to nothing was left."""
    pair = waiting()
    for kind in (DomainEventKind.PAUSED, DomainEventKind.PRE_SWITCHOVER):
        pair.push(pair.source, v.GuestReported(kind=kind, at_s=pair.now_s))
    pair.run()
    assert "BeginSwitchover" not in pair.commands(SOURCE)
    return pair


@pytest.mark.parametrize("on_timeout", OnTimeout)
def test_a_guest_that_stands_still_doesnt_wait_for_long(on_timeout: OnTimeout) -> None:
    """It stood for as long as hooks and stores took: by default ten minutes at most, and without
    any bound where the pause is forced when the time is over."""
    pair = halted()
    pair.source.request = msgspec.structs.replace(pair.source.request, on_timeout=on_timeout)
    began_s = pair.now_s
    pair.silence(v.AbortSwitchover)
    assert pair.run(timers=1)[0] is MigrationState.CANCELLING
    assert pair.now_s - began_s == pytest.approx(2.0, abs=0.1)
    assert pair.source.error == (
        "the hypervisor stopped the guest by itself, as next to nothing was left, and leave to go "
        "on (the store, storage) didn't come within 2 s"
    )
    resumed = v.GuestReported(kind=DomainEventKind.RESUMED, at_s=pair.now_s)
    pair.push(pair.source, resumed)
    pair.push(pair.source, v.SwitchoverAborted(outcome=AbortOutcome.RESUMED))
    pair.push(pair.source, v.LeaveGiven())  # Late.
    assert pair.run()[0] is MigrationState.FAILED
    assert pair.source.blackout_ms == pytest.approx(2000.0, abs=100.0)
    assert "BeginSwitchover" not in pair.commands(SOURCE)
    assert pair.record.owner == "n1"


def test_leave_that_comes_in_time_lets_it_go_and_its_journal_doesnt_take_long() -> None:
    pair = halted()
    pair.now_s += 1.5
    pair.push(pair.source, v.LeaveGiven())
    assert pair.run() == ENDED_AWAY
    notes = [each for _, each in pair.given if isinstance(each, v.Journal)]
    assert [each.state for each in notes if each.standing] == [MigrationState.SWITCHOVER]


def test_a_guest_that_still_runs_waits_for_its_journal_as_long_as_that_takes() -> None:
    pair = SessionPair()
    assert pair.run() == ENDED_AWAY
    assert not [each for _, each in pair.given if isinstance(each, v.Journal) and each.standing]


def test_a_journal_that_takes_too_long_is_named() -> None:
    pair = halted()
    pair.silence(v.Journal)
    pair.push(pair.source, v.LeaveGiven())
    pair.run_until_state(MigrationState.SWITCHOVER)
    pair.push(pair.source, v.TimerFired(name=v.TimerName.SWITCHOVER))
    pair._events.rotate(1)
    pair._step()
    assert (pair.source.error or "").startswith("the switchover stalled: the guest stands still")


def test_one_that_runs_on_after_all_may_wait_again() -> None:
    pair = halted()
    resumed = v.GuestReported(kind=DomainEventKind.RESUMED, at_s=pair.now_s)
    pair.push(pair.source, resumed)
    pair.run()
    assert (SOURCE, v.TimerName.SWITCHOVER) not in pair.timers
    pair.now_s += 20.0
    pair.push(pair.source, v.LeaveGiven())
    assert pair.run() == ENDED_AWAY


def test_a_pause_by_something_else_isnt_the_hypervisors() -> None:
    pair = waiting()
    pair.push(pair.source, v.GuestReported(kind=DomainEventKind.PAUSED, at_s=pair.now_s))
    pair.run()
    assert (SOURCE, v.TimerName.SWITCHOVER) not in pair.timers


# --- what ends the wait ---


def test_it_can_be_cancelled_while_it_waits_and_late_leave_is_ignored() -> None:
    pair = waiting()
    pair.push(pair.source, v.CancelRequested())
    pair.push(pair.source, v.LeaveGiven())
    assert pair.run()[0] is MigrationState.CANCELLED
    assert "BeginSwitchover" not in pair.commands(SOURCE)


@pytest.mark.parametrize(
    ("mode", "on_timeout"),
    [(MigrationMode.HYBRID, OnTimeout.CANCEL), (MigrationMode.PRECOPY, OnTimeout.FORCE)],
)
def test_an_engine_that_hangs_when_the_time_is_over_ends_it(
    mode: MigrationMode, on_timeout: OnTimeout
) -> None:
    """Nothing did: what is left was to follow the guest, or the pause to be forced."""
    pair = SessionPair()
    pair.source.request = msgspec.structs.replace(pair.request, mode=mode, on_timeout=on_timeout)
    pair.silence(v.RunPass)
    pair.run()
    over = v.TimerFired(name=v.TimerName.TOTAL)
    pair.push(pair.source, over)
    assert pair.run()[0] is MigrationState.PRECOPY
    assert (SOURCE, v.TimerName.TOTAL) in pair.timers
    pair.now_s += 59.0
    moved = v.EngineReported(bytes_sent=1, remaining_bytes=1, throughput_bytes_per_s=None)
    pair.push(pair.source, moved)
    pair.run()
    pair.now_s += 59.0
    pair.push(pair.source, over)
    assert pair.run()[0] is MigrationState.PRECOPY, "it has moved"
    pair.now_s += 61.0
    pair.push(pair.source, over)
    assert pair.run()[0] is MigrationState.FAILED
    assert "its engine doesn't answer" in (pair.source.error or "")
    assert pair.record.owner == "n1"


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
