"""Storage that keeps a destination from fencing: who has the guest then, under all other faults.

A destination yields 15 s after it has won, which is longer than the faults of most seeds last: so
these clusters have fences that hardly ever succeed, for a minute.
"""

from __future__ import annotations

from typing import ClassVar

import pytest

from migrator.session.destination import DestinationSession
from tests.simulation.mutant_runs import MutantSessions, first_violation
from tests.simulation.scenario import play
from tests.simulation.world import Faults

SEEDS = 150
FAULTS = Faults(
    fence_failure=0.93,
    store_unknown=0.3,
    store_late=0.9,
    loss=0.1,
    kill_mean_s=6.0,
    hypervisor_share=0.4,
    journal_failure=0.1,
    heal_at_s=60.0,
)


class Counted(DestinationSession):
    """How often the rule was played at all."""

    yields: ClassVar = 0

    def _yield(self) -> None:
        Counted.yields += 1
        super()._yield()


class GoesOnTrying(DestinationSession):
    """It tries to give the record back, and to run the guest, whichever comes first."""

    def _yield(self) -> None:
        super()._yield()
        self._yielding = False


class ForgetsThatItYields(DestinationSession):
    """Its next agent doesn't know that a write of the last one may land."""

    first_seed: ClassVar = 179

    @property
    def yielding(self) -> bool:
        return False


@pytest.mark.timeout(600)
def test_every_invariant_holds() -> None:
    for seed in range(SEEDS):
        play(seed, faults=FAULTS, sessions=MutantSessions(Counted))
    assert Counted.yields > SEEDS / 5, Counted.yields


@pytest.mark.timeout(600)
@pytest.mark.parametrize("mutant", [GoesOnTrying, ForgetsThatItYields])
def test_each_broken_rule_is_found(mutant: type[DestinationSession]) -> None:
    found = first_violation(mutant, 20 * SEEDS, FAULTS)
    assert found.startswith(("1:", "2:", "3:", "4:")), found
