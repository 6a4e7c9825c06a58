"""Local disks that hang, and hold up the journal: a guest stands still for seconds, and is one.

A rollback notes its `cont` first, and where the journal isn't written, the record has to say it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import ClassVar

import pytest

from migrator.model import OwnershipRecord
from migrator.session import vocabulary as v
from migrator.session.destination import DestinationSession
from migrator.session.source import SourceSession
from tests.simulation.faults import HANGING_DISKS
from tests.simulation.mutant_runs import MutantSessions, first_violation
from tests.simulation.scenario import play
from tests.simulation.world import Faults

SEEDS = 150
NOTHING_ELSE = Faults(disk_hang=0.15, loss=0.5, heal_at_s=60.0)
"""Messages get lost, so that there are rollbacks."""
BRIEF = Faults(
    disk_hang=0.4,
    disk_hang_s_max=3.0,
    store_unknown=0.4,
    store_late=1.0,
    loss=0.5,
    kill_mean_s=0.8,
    heal_at_s=20.0,
)
"""The next agent begins while a write of the last one may still land."""
STANDS_STILL_S_MAX = 4.0
"""In a rollback, once the record is won: two fences, and a note that is waited for."""


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Production code warns of what the simulation does to it."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


class Counted(SourceSession):
    """How often the rule was played at all."""

    said: ClassVar = 0

    def _say(self) -> None:
        Counted.said += 1
        super()._say()


class Timed(SourceSession):
    """For how long guests stood still in rollbacks."""

    longest_s: ClassVar = 0.0
    rollbacks: ClassVar = 0
    waits: ClassVar = False
    """It tries to note it until the disk is back."""
    won_at_s = 0.0

    def _rollback(self, token: int) -> None:
        self.won_at_s = self.won_at_s or self._now
        super()._rollback(token)

    def _finish_stopped(self) -> None:
        if self.won_at_s:
            Timed.rollbacks += 1
            Timed.longest_s = max(Timed.longest_s, self._now - self.won_at_s)
        super()._finish_stopped()

    def _say(self) -> None:
        if Timed.waits:
            self._retry_later()
        else:
            super()._say()


class ResumesWithoutANote(SourceSession):
    """The note can't be written, and the guest stands still: so without one."""

    first_seed: ClassVar = 591

    def _say(self) -> None:
        if self._journalled is None:
            self._may_have_resumed = True
            self._do(v.ResumeGuest())
        else:
            super()._say()


class TrustsWhatItFinds(SourceSession):
    """Its last agent won the record back, and may have made it say more, which lands late."""

    first_seed: ClassVar = 372

    def _find_won(self, token: int) -> None:
        self._rollback(token)


class TakesItForTheEnd(DestinationSession):
    """The source says that it resumes the guest: but it may die before it does."""

    def _lost_to(self, record: OwnershipRecord | None) -> None:
        if record == self.record_before.passed_to(self.source).said_resuming():
            self._give_up("the source kept the guest")
        else:
            super()._lost_to(record)


@pytest.mark.timeout(600)
def test_every_invariant_holds() -> None:
    Counted.said = 0
    for seed in range(SEEDS):
        play(seed, faults=HANGING_DISKS, sessions=MutantSessions(Counted))
        play(seed, faults=BRIEF, sessions=MutantSessions(Counted))
    assert Counted.said > SEEDS / 10, Counted.said


def _longest_s(*, waits: bool) -> float:
    Timed.longest_s, Timed.rollbacks, Timed.waits = 0.0, 0, waits
    for seed in range(SEEDS):
        play(seed, faults=NOTHING_ELSE, sessions=MutantSessions(Timed))
    assert Timed.rollbacks > SEEDS / 10, Timed.rollbacks
    return Timed.longest_s


@pytest.mark.timeout(600)
def test_a_guest_that_is_rolled_back_does_not_wait_for_a_disk() -> None:
    assert _longest_s(waits=False) < STANDS_STILL_S_MAX


@pytest.mark.timeout(600)
def test_one_that_waits_is_found() -> None:
    assert _longest_s(waits=True) > STANDS_STILL_S_MAX


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("mutant", "faults"),
    [
        (ResumesWithoutANote, HANGING_DISKS),
        (TrustsWhatItFinds, BRIEF),
        (TakesItForTheEnd, HANGING_DISKS),
    ],
)
def test_each_broken_rule_is_found(
    mutant: type[SourceSession | DestinationSession], faults: Faults
) -> None:
    found = first_violation(mutant, 20 * SEEDS, faults)
    assert found.startswith(("1:", "2:", "3:", "4:")), found
