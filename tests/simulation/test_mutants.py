"""The checkers can fail: each rule, broken on purpose, is found, and by the right invariant."""

from __future__ import annotations

import pytest

from tests.simulation.mutants import MUTANTS, Mutant, node_with
from tests.simulation.scenario import AIMED, play
from tests.simulation.world import InvariantViolation

SEEDS_MAX = 6_000
"""The commonest is found by seed 0; a mutant's `first_seed` says where to look for a rare one."""


@pytest.mark.timeout(120)
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_a_broken_rule_is_found(mutant: type[Mutant]) -> None:
    make_node = node_with(mutant)
    words = tuple(mutant.found_as)  # type: ignore[union-attr]
    first: int = getattr(mutant, "first_seed", 0)
    for seed in range(first, first + SEEDS_MAX):
        for faults in (None, AIMED):
            try:
                play(seed, make_node=make_node, faults=faults)
            except InvariantViolation as error:
                if str(error).startswith(words):
                    return
    pytest.fail(f"{SEEDS_MAX} seeds didn't find {mutant.__name__}: {mutant.__doc__}")
