"""A store that goes back, and answers that are late: who has the guest then, under other faults.

Somebody restores an older copy of the store in the middle of handoffs, sees that, and puts it
right. Nothing may be ended for what that copy says. `make sim` plays one such seed in fifty.
"""

from __future__ import annotations

from typing import ClassVar

import pytest

from migrator.session import vocabulary as v
from migrator.session.destination import DestinationSession
from migrator.session.source import SourceSession
from tests.simulation.faults import faults_of
from tests.simulation.mutant_runs import MutantSessions, first_violation
from tests.simulation.node import Node
from tests.simulation.scenario import play
from tests.simulation.world import Faults

SEEDS = 200
FAULTS = Faults(
    store_back_mean_s=1.5,
    store_slow=0.3,
    store_unknown=0.2,
    store_late=0.5,
    loss=0.5,
    aimed=0.4,
    hypervisor_share=0.3,
    heal_at_s=30.0,
)


class Counted(SourceSession):
    """How often an older record was read at all."""

    not_believed: ClassVar = 0

    def _believed(self, event: v.RecordRead) -> v.RecordRead:
        believed = super()._believed(event)
        Counted.not_believed += believed is not event
        return believed


class SourceBelieves(SourceSession):
    """By an older record its guest has moved on long ago."""

    first_seed: ClassVar = 20

    def _believed(self, event: v.RecordRead) -> v.RecordRead:
        return event


class DestinationBelieves(DestinationSession):
    """By an older record its guest is somebody else's."""

    first_seed: ClassVar = 82

    def _believed(self, event: v.RecordRead) -> v.RecordRead:
        return event


class EndsWhatTheStoreHasForgotten(Node):
    """By an older record a guest that runs here is a stale copy."""

    def boot_up(self) -> None:
        super().boot_up()
        assert self.agent is not None

        async def nothing(*_: object) -> None:
            pass

        older = self.agent.domains.ownership.older
        older.refuse_end = nothing  # type: ignore[method-assign,assignment]


@pytest.mark.timeout(600)
def test_every_invariant_holds() -> None:
    Counted.not_believed = 0
    for seed in range(SEEDS):
        play(seed, faults=FAULTS, sessions=MutantSessions(Counted))
    assert Counted.not_believed > SEEDS / 5, Counted.not_believed


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "mutant", [SourceBelieves, DestinationBelieves, EndsWhatTheStoreHasForgotten]
)
def test_each_broken_rule_is_found(mutant: type[SourceSession | DestinationSession | Node]) -> None:
    found = first_violation(mutant, 10 * SEEDS, FAULTS)
    assert found.startswith(("1:", "2:", "3:", "4:", "5:")), found


def test_make_sim_plays_some() -> None:
    back = [seed for seed in range(200) if faults_of(seed).store_back_mean_s]
    assert back == [23, 73, 123, 173]
