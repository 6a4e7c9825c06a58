"""A store that is restored from an older snapshot, for good: no guest is ended, or doubled, by it.

Operators start what it calls stopped, hosts are rebooted and their agents start what it says ran
there; and somebody has it know what runs. `make sim` plays one such seed in fifty.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from tests.simulation.faults import faults_of
from tests.simulation.mutant_runs import first_violation
from tests.simulation.node import Node
from tests.simulation.scenario import Scenario
from tests.simulation.test_older_stores import EndsWhatTheStoreHasForgotten
from tests.simulation.world import Faults

SEEDS = 100
TAKEOVER_SEEDS = 200
FAULTS = Faults(
    store_restored=True,
    loss=0.3,
    aimed=0.2,
    hypervisor_share=0.3,
    kill_mean_s=4.0,
    reboot_share=0.3,
    heal_at_s=40.0,
)
AMONG_TAKEOVERS = Faults(
    store_restored=True,
    restored_after_s_max=40.0,
    takeover=True,
    loss=0.2,
    kill_mean_s=3.0,
    hypervisor_share=0.1,
    reboot_share=0.1,
    long_down=0.9,
    fence_failure=0.7,
    heal_at_s=40.0,
)
"""Of nodes that are silent for long, whose guests are taken over behind fences that mostly fail."""


class StartsBesideOthers(Node):
    """It takes the store's word, and the next token that the volumes know."""

    def boot_up(self) -> None:
        super().boot_up()
        assert self.agent is not None
        self.agent.domains.ownership.older._others = None


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Production code warns of what the simulation does to it."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.timeout(600)
def test_every_invariant_holds() -> None:
    refused = kept = 0
    for seed in range(SEEDS):
        scenario = Scenario(seed, faults=FAULTS)
        scenario.play()
        told = "\n".join(scenario.world.transcript())
        refused += "has it, which the store doesn't know" in told
        kept += ", knows now" in told
    assert kept > SEEDS / 10
    assert refused > SEEDS / 50


@pytest.mark.timeout(600)
def test_takeovers_that_the_store_has_forgotten() -> None:
    """One whose fence never came about ended nothing: the guest that it meant to end is the domain
    again. And no fence of before the restore comes after it."""
    forgotten = 0
    for seed in range(TAKEOVER_SEEDS):
        scenario = Scenario(seed, faults=AMONG_TAKEOVERS)
        scenario.play()
        told = "\n".join(scenario.world.transcript())
        forgotten += "is forgotten" in told
    assert forgotten > 0


@pytest.mark.timeout(600)
@pytest.mark.parametrize("mutant", [StartsBesideOthers, EndsWhatTheStoreHasForgotten])
def test_each_broken_rule_is_found(mutant: type[Node]) -> None:
    found = first_violation(mutant, 5 * SEEDS, FAULTS)
    assert found.startswith(("1:", "4:")), found


def test_make_sim_plays_some() -> None:
    restored = [seed for seed in range(200) if faults_of(seed).store_restored]
    assert restored == [33, 83, 133, 183]
