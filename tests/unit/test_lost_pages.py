"""Post-copy whose pages are gone at the source, while the hypervisor at the destination is silent:
its main loop waits for one of them, so that it never says whether it has resumed the guest.
"""

from __future__ import annotations

import pytest

from migrator.model import MigrationMode, MigrationRequest, MigrationState, Role
from migrator.session import vocabulary as v
from migrator.session.messages import Filled
from tests.unit.session_pair import DESTINATION, SOURCE, Session, SessionPair

_S = MigrationState
_OF_THE_ENGINE = (v.StartEngine, v.ConnectEngine)
FAILED = (_S.FAILED, _S.FAILED)


class SilentPair(SessionPair):
    """The destination's hypervisor answers nothing while `silent_there`; the source's, and what
    its engine has open of it, isn't there any more once it is `gone_here`.
    """

    silent_there = False
    gone_here = False

    def _perform(self, session: Session, command: v.Command) -> None:
        there = session.role is DESTINATION
        if self.silent_there and there and isinstance(command, v.InspectGuest | v.ResumeGuest):
            name = type(command).__name__
            self.push(session, v.CommandFailed(command=name, error="it doesn't answer"))
        elif self.gone_here and not there and isinstance(command, _OF_THE_ENGINE):
            self.push(session, v.EngineLost(reason="the process is gone"))
        else:
            super()._perform(session, command)

    def _condition(self, role: Role) -> v.GuestCondition:
        if self.gone_here and role is SOURCE:
            return v.GuestCondition.GONE
        return super()._condition(role)

    def lose_the_source_s_pages(self) -> None:
        self.gone_here = True
        self.push(self.source, v.EngineLost(reason="killed"))


@pytest.fixture
def pair() -> SilentPair:
    return SilentPair(MigrationRequest(destination="n2", mode=MigrationMode.POSTCOPY))


def test_a_restarted_destination_hears_that_they_are(pair: SilentPair) -> None:
    """The source said so, and has ended: nothing but its answers can say it again."""
    assert pair.run() == (_S.POSTCOPY, _S.POSTCOPY)
    pair.lose_the_source_s_pages()
    assert pair.run() == (_S.FAILED, _S.POSTCOPY)
    pair.silent_there = True
    pair.restart(DESTINATION)
    assert pair.run() == (_S.FAILED, _S.RECOVERING), (
        "its engine may be about to say that it is full"
    )
    assert pair.run(timers=3) == FAILED
    assert "DestroyGuest" in pair.commands(DESTINATION)
    assert pair.destination.error == (
        "the source's hypervisor and engine ended before the destination held every page"
    )


@pytest.mark.parametrize("restarted", [False, True])
def test_a_source_that_never_heard_of_the_resume_says_so(pair: SilentPair, restarted: bool) -> None:
    """Its host was rebooted, say: each side waited for the other's word, for ever."""
    pair.silent_there = True
    assert pair.run() == (_S.HANDOFF, _S.HANDOFF)
    pair.lose_the_source_s_pages()
    if restarted:
        pair.restart(SOURCE, boot_id="next boot")
        pair.timers[DESTINATION, v.TimerName.RETRY] = pair.now_s
    assert pair.run(timers=20) == FAILED
    assert "DestroyGuest" in pair.commands(DESTINATION)
    assert pair.source.error == pair.destination.error
    assert "ended before the destination held every page" in (pair.source.error or "")
    assert isinstance(pair.destination.last_word(), Filled)


def test_a_guest_whose_pages_come_is_waited_for(pair: SilentPair) -> None:
    pair.silent_there = True
    pair.run(timers=20)
    assert pair.destination.state is _S.HANDOFF
    pair.silent_there = False
    pair.resumed_on.append(DESTINATION)
    assert pair.run(timers=4) == (_S.POSTCOPY, _S.POSTCOPY)


def test_one_that_never_ran_is_not_ended_for_it(pair: SilentPair) -> None:
    """It can't be fenced yet. Once it runs, it is seen whether it lacks a page at all."""
    pair.fail(v.Fence)
    pair.run()
    pair.lose_the_source_s_pages()
    pair.run(timers=20)
    assert pair.destination.state in (_S.HANDOFF, _S.RECOVERING)
    assert "DestroyGuest" not in pair.commands(DESTINATION)
