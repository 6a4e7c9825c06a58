"""Agents that stand still for up to a minute, and then go on; and such as forget what has ended.

A machine that swaps, a debugger, SIGSTOP: what such an agent was told meanwhile it hears at once,
its timers are all due, and answers that it acts on are old. `make sim` plays one such seed in
fifty.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import pytest

from migrator.session import vocabulary as v
from migrator.session.source import SourceSession
from tests.simulation.faults import faults_of
from tests.simulation.mutant_runs import first_violation
from tests.simulation.node import Node
from tests.simulation.scenario import play
from tests.simulation.world import Faults

SEEDS = 150
FAULTS = Faults(
    paused=0.5,
    takeover=True,
    aimed=0.3,
    hypervisor_share=0.3,
    loss=0.1,
    store_unknown=0.1,
    store_late=0.5,
    fence_failure=0.3,
    forgetful=True,
    heal_at_s=90.0,
)


class Counted(Node):
    """How often an agent stood still at all, and for how long."""

    seconds: ClassVar = 0.0

    def stop_agent(self, seconds: float) -> None:
        Counted.seconds += seconds
        super().stop_agent(seconds)


class NeverDoubtsItsRollback(SourceSession):
    """What it has won is its own, however long ago that was."""

    first_seed: ClassVar = 218

    def _retry(self) -> None:
        if self._rollback_token is not None and not self._destination_runs:
            self._do(v.Fence(token=self._rollback_token))
        else:
            super()._retry()


class TakesForgettingForGivingUp(SourceSession):
    """A destination that knows nothing of a migration can't have run the guest: but it forgets."""

    def _destination_gave_up(self, reason: str, *, unknown: bool) -> None:
        super()._destination_gave_up(reason, unknown=False)


@pytest.mark.timeout(600)
def test_every_invariant_holds() -> None:
    Counted.seconds = 0.0
    for seed in range(SEEDS):
        play(seed, faults=FAULTS, make_node=Counted)
    assert Counted.seconds > 10.0 * SEEDS, Counted.seconds


@pytest.mark.timeout(600)
@pytest.mark.parametrize("mutant", [NeverDoubtsItsRollback, TakesForgettingForGivingUp])
def test_each_broken_rule_is_found(mutant: type[SourceSession]) -> None:
    found = first_violation(mutant, 20 * SEEDS, FAULTS)
    assert found.startswith(("1:", "2:", "3:", "4:", "5:")), found


@pytest.mark.timeout(600)
def test_a_takeover_that_stood_still_while_another_one_came_by() -> None:
    """And while the store is an older copy at times. Its guest is stale when it begins at last."""
    mix = dataclasses.replace(FAULTS, store_back_mean_s=3.0, store_slow=0.2)
    for seed in range(2_100, 2_150):
        play(seed, faults=mix)


def test_make_sim_plays_some() -> None:
    paused = [seed for seed in range(200) if faults_of(seed).paused]
    assert paused == [43, 93, 143, 193]
