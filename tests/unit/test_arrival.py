"""The destination before the handoff, when its engine is lost: what may be whole isn't given up."""

from __future__ import annotations

import pytest

from migrator.model import MigrationMode, MigrationRequest, MigrationState
from migrator.ports import DomainEventKind
from migrator.session import messages as m
from migrator.session import vocabulary as v
from tests.unit.session_pair import COMPLETED, DESTINATION, GONE, SOURCE, SessionPair

_S = MigrationState
LOST = v.EngineLost(reason="killed")
LOADED = v.GuestInspected(condition=v.GuestCondition.LOADED)
INCOMING = v.GuestInspected(condition=v.GuestCondition.INCOMING)


def handed_off(mode: MigrationMode) -> SessionPair:
    """The source's device state is out; the destination has heard of nothing yet."""
    pair = SessionPair(MigrationRequest(destination="n2", mode=mode))
    pair.silence(m.Commit, v.InspectGuest, v.ContinueSwitchover)
    pair.run()
    pair.sent = True
    out = v.GuestReported(kind=DomainEventKind.DEVICE_STATE_SENT, at_s=pair.now_s)
    pair.push(pair.source, out)
    pair.run()
    assert (pair.source.state, pair.destination.state) == (_S.HANDOFF, _S.PRECOPY)
    return pair


def sent(mode: MigrationMode = MigrationMode.PRECOPY) -> SessionPair:
    """The device state is out, the destination's engine is lost, and nothing more was heard."""
    pair = handed_off(mode)
    pair.push(pair.destination, LOST)
    pair.run()
    assert pair.destination.state is _S.PRECOPY
    assert pair.commands(DESTINATION)[-1] == "InspectGuest"
    return pair


def test_a_copy_that_is_loaded_needs_no_engine_and_is_handed_over() -> None:
    pair = sent()
    pair.push(pair.destination, LOADED)
    pair.push(pair.destination, v.Received(message=m.Commit()))
    assert pair.run() == COMPLETED
    assert pair.resumed_on == [DESTINATION]


def test_a_loaded_copy_outlives_its_engine_until_the_source_has_decided() -> None:
    pair = sent()
    pair.push(pair.destination, LOADED)
    pair.push(pair.destination, v.TimerFired(name=v.TimerName.PEER))
    pair.run()
    assert "DestroyGuest" not in pair.commands(DESTINATION)
    pair.silent = {m.Commit}
    pair.run(timers=2)
    assert pair.resumed_on == [SOURCE]
    assert "DestroyGuest" in pair.commands(DESTINATION)


def test_a_copy_that_is_not_loaded_is_told_and_kept_until_the_source_has_its_guest_back() -> None:
    pair = sent()
    pair.push(pair.destination, INCOMING)
    assert pair.run() == (_S.FAILED, _S.CANCELLED)
    words = [each for each in pair.given if isinstance(each[1], v.Send | v.ResumeGuest)]
    assert [
        type(each.message).__name__ if isinstance(each, v.Send) else "resumed"
        for _, each in words[-4:]
    ] == ["Pending", "resumed", "Abort", "Aborted"]
    assert pair.source.error == "the destination gave up: the destination's engine: killed"
    assert (pair.record.owner, pair.record.token) == ("n1", 2)


def test_what_is_loaded_after_all_is_handed_over() -> None:
    pair = sent()
    pair.silence(m.Pending)
    pair.push(pair.destination, INCOMING)
    pair.push(pair.destination, v.Received(message=m.Commit()))
    pair.run()
    assert pair.destination.state is _S.SWITCHOVER
    loaded = v.GuestReported(kind=DomainEventKind.DEVICE_STATE_LOADED, at_s=pair.now_s)
    pair.push(pair.destination, loaded)
    assert pair.run() == COMPLETED


def test_what_is_never_loaded_is_given_up_in_the_end() -> None:
    """Also if the source, whose hypervisor is gone, goes on saying Commit."""
    pair = sent()
    pair.silence(m.Pending)
    pair.push(pair.destination, v.Received(message=m.Commit()))
    pair.push(pair.destination, INCOMING)
    pair.run()
    asked = pair.commands(DESTINATION).count("InspectGuest")
    pair.now_s += pair.destination.timing.settle_s / 2
    pair.push(pair.destination, v.TimerFired(name=v.TimerName.RETRY))
    pair.push(pair.destination, INCOMING)
    pair.run()
    assert pair.commands(DESTINATION).count("InspectGuest") == asked + 1
    assert "DestroyGuest" not in pair.commands(DESTINATION)
    pair.now_s += pair.destination.timing.settle_s
    pair.push(pair.destination, v.TimerFired(name=v.TimerName.RETRY))
    pair.push(pair.destination, INCOMING)
    pair.run()
    assert pair.destination.state is _S.CANCELLED
    assert "Aborted" in pair.messages(DESTINATION)


def test_a_hypervisor_that_does_not_answer_is_asked_again() -> None:
    pair = sent()
    pair.silence(m.Pending)
    pair.now_s += pair.destination.timing.settle_s * 2
    pair.push(pair.destination, v.CommandFailed(command="InspectGuest", error="timeout"))
    pair.run()
    assert pair.messages(DESTINATION)[-1] == "Pending"
    assert "DestroyGuest" not in pair.commands(DESTINATION)
    assert (DESTINATION, v.TimerName.RETRY) in pair.timers


@pytest.mark.parametrize("ended", [GONE, v.GuestReported(kind=DomainEventKind.EXITED, at_s=1000.0)])
def test_a_hypervisor_that_ends_with_its_engine_says_so_and_why(ended: v.Event) -> None:
    pair = sent()
    pair.push(pair.destination, ended)
    assert pair.run() == (_S.FAILED, _S.CANCELLED)
    assert pair.destination.error == "the destination's engine: killed"
    assert pair.resumed_on == [SOURCE]


def test_during_pre_copy_the_source_goes_on_at_once() -> None:
    pair = SessionPair()
    pair.silence(v.RunPass, v.InspectGuest)
    pair.run()
    pair.push(pair.destination, LOST)
    pair.push(pair.destination, INCOMING)
    assert pair.run() == (_S.FAILED, _S.CANCELLED)
    assert pair.source.error == "the destination gave up: the destination's engine: killed"
    assert (pair.record.owner, pair.record.token) == ("n1", 1)


def test_an_engine_that_ends_before_it_listens_leaves_nothing_to_wait_for() -> None:
    pair = SessionPair()
    pair.silence(v.StartEngine)
    pair.run()
    pair.push(pair.destination, LOST)
    assert pair.run() == (_S.FAILED, _S.CANCELLED)


def test_a_lost_answer_is_found_out_by_asking_for_the_engine_again() -> None:
    pair = SessionPair()
    pair.silence(m.Prepared, m.Pending, v.InspectGuest)
    pair.run()
    pair.push(pair.destination, LOST)
    pair.push(pair.destination, INCOMING)
    assert pair.run() == (_S.SETUP, _S.PRECOPY)
    pair.silent -= {m.Pending}
    pair.push(pair.source, v.TimerFired(name=v.TimerName.RETRY))
    assert pair.run() == (_S.FAILED, _S.CANCELLED)
    assert "ConnectEngine" not in pair.commands(SOURCE)


@pytest.mark.parametrize("news_first", [True, False])
def test_a_guest_that_lacks_pages_gets_another_engine_before_it_runs(news_first: bool) -> None:
    pair = handed_off(MigrationMode.POSTCOPY)
    news: list[v.Event] = [LOST, v.PagesMissing()]
    for event in reversed(news) if news_first else news:
        pair.push(pair.destination, event)
    pair.push(pair.destination, LOADED)
    pair.run()
    if news_first:
        pair.push(pair.destination, v.TimerFired(name=v.TimerName.ENGINE))
    pair.run()
    starts = [each for _, each in pair.given if isinstance(each, v.StartEngine)]
    assert starts[-1] == v.StartEngine(post_copy=True)
    pair.push(pair.destination, v.Received(message=m.Commit(post_copy=True)))
    assert pair.run() == (_S.POSTCOPY, _S.POSTCOPY)
    assert len(starts) == len([each for _, each in pair.given if isinstance(each, v.StartEngine)])


@pytest.mark.parametrize("word", [m.Lost(reason="taken over"), m.Farewell()])
def test_a_source_that_ended_and_has_no_copy_leaves_nothing_to_wait_for(
    word: m.SessionMessage,
) -> None:
    """Its Commit was lost, its node silent; the domain was taken over by a third one meanwhile."""
    pair = handed_off(MigrationMode.POSTCOPY)
    pair.push(pair.destination, v.PagesMissing())
    pair.push(pair.destination, v.Received(message=word))
    pair.run()
    assert pair.destination.state is _S.CANCELLED
    assert DESTINATION not in pair.resumed_on
