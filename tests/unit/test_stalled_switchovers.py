"""A switchover in which something hangs: what is said meanwhile, and when it goes on after all."""

from __future__ import annotations

import pytest

from migrator.model import MigrationMode, MigrationRequest, MigrationState, OnTimeout
from migrator.ports import DomainEventKind
from migrator.session import messages as m
from migrator.session import vocabulary as v
from migrator.session.base import Timing
from node_agent.migrations.connections import TELL_S
from node_agent.migrations.cutover import EXPECT_S
from tests.unit.session_pair import COMPLETED, DESTINATION, SOURCE, SessionPair

_S = MigrationState
TIMER = (SOURCE, v.TimerName.SWITCHOVER)


@pytest.mark.parametrize(
    ("hangs", "why"),
    [
        (v.BeginSwitchover, "the hypervisor hasn't paused the guest"),
        (v.ContinueSwitchover, "the device state doesn't get through"),
    ],
)
def test_a_switchover_that_stalls_says_what_it_waited_for(hangs: type[object], why: str) -> None:
    pair = SessionPair()
    pair.silence(hangs)
    assert pair.run(timers=1)[0] is _S.FAILED
    assert pair.source.error == f"the switchover stalled: {why}"


def test_its_time_counts_from_the_pause() -> None:
    """It counted from before the network's part, while the guest still ran."""
    pair = SessionPair()
    pair.silence(v.BeginSwitchover)
    pair.run()
    assert pair.timers[TIMER] - pair.now_s == pytest.approx(3.5, abs=0.1)
    pair.now_s += 1.4
    pair.push(pair.source, v.GuestReported(kind=DomainEventKind.PAUSED, at_s=pair.now_s))
    pair.run()
    assert pair.timers[TIMER] - pair.now_s == pytest.approx(2.0, abs=0.1)
    again = v.GuestReported(kind=DomainEventKind.PAUSED, at_s=pair.now_s + 1.0)
    due_s = pair.timers[TIMER]
    pair.now_s += 1.0
    pair.push(pair.source, again)
    pair.run()
    assert pair.timers[TIMER] == due_s
    pair.push(pair.source, v.GuestReported(kind=DomainEventKind.PRE_SWITCHOVER, at_s=pair.now_s))
    assert pair.run() == COMPLETED


def test_a_forced_one_has_the_time_that_it_was_predicted_from_the_pause() -> None:
    request = MigrationRequest(
        destination="n2", mode=MigrationMode.PRECOPY, on_timeout=OnTimeout.FORCE
    )
    pair = SessionPair(request, pending=lambda number: 100_000)
    pair.silence(v.BeginSwitchover)
    pair.run()
    predicted_s = pair.source.decisions[-1].predicted_blackout_ms / 1e3
    assert predicted_s > 0.1
    pair.push(pair.source, v.GuestReported(kind=DomainEventKind.PAUSED, at_s=pair.now_s))
    pair.run()
    left_s = pair.timers[TIMER] - pair.now_s
    assert left_s == pytest.approx(2.0 + 3.0 * predicted_s, abs=0.01)


def test_post_copys_has_the_same_time_from_the_pause() -> None:
    pair = SessionPair(MigrationRequest(destination="n2", mode=MigrationMode.POSTCOPY))
    pair.silence(v.BeginSwitchover)
    pair.run()
    pair.push(pair.source, v.GuestReported(kind=DomainEventKind.PAUSED, at_s=pair.now_s))
    pair.run()
    assert pair.timers[TIMER] - pair.now_s == pytest.approx(2.0, abs=0.1)


def test_the_networks_part_has_its_time_before_the_pause() -> None:
    assert Timing().depart_s >= TELL_S + EXPECT_S


def test_while_the_guest_does_not_run_on_yet_it_is_said_why() -> None:
    pair = SessionPair()
    pair.silence(v.ContinueSwitchover)
    pair.fail(v.AbortSwitchover)
    assert pair.run(timers=1)[0] is _S.CANCELLING
    shown = pair.source.view().error or ""
    assert shown.endswith(
        "the device state doesn't get through; the guest doesn't run on yet: broken"
    )
    pair.failing.clear()
    assert pair.run(timers=1)[0] is _S.FAILED
    shown = pair.source.view().error or ""
    assert shown.endswith("the device state doesn't get through")


def test_a_resume_that_comes_late_is_heard_at_once() -> None:
    """Its hypervisor, or the storage under it, hung. What passed until the next look, some seconds,
    counted as the guest's blackout, and its source kept its copy."""
    pair = SessionPair()
    pair.silence(v.ResumeGuest, v.InspectGuest)
    pair.run()
    pair.push(pair.destination, v.CommandFailed(command="ResumeGuest", error="timeout"))
    pair.run()
    pair.now_s += 20.0
    ran_at_s = pair.now_s
    pair.push(pair.destination, v.GuestReported(kind=DomainEventKind.RESUMED, at_s=ran_at_s))
    assert pair.run() == COMPLETED
    assert "Announce" in pair.commands(DESTINATION)
    running = next(
        command.message
        for role, command in pair.given
        if role is DESTINATION
        and isinstance(command, v.Send)
        and isinstance(command.message, m.Running)
    )
    assert running.resumed_at_s == ran_at_s


def test_one_whose_answer_is_awaited_is_its_answers_to_tell() -> None:
    pair = SessionPair()
    pair.silence(v.ResumeGuest)
    pair.run()
    pair.push(pair.destination, v.GuestReported(kind=DomainEventKind.RESUMED, at_s=pair.now_s))
    pair.run()
    assert pair.destination.state is _S.HANDOFF
