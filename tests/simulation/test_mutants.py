"""The checkers can fail: each rule, broken on purpose, is found, and by the right invariant."""

from __future__ import annotations

import pytest

from tests.simulation.mutant_runs import Mutant, seeds_for, violations
from tests.simulation.mutants import MUTANTS

SEEDS_MAX = 2_000
"""The first of `make sim`, as it plays them. Rare ones are found among the first that have one
mix of its faults (`make sim SEEDS=70000` has so many), or that are played with it."""
RARE_MAX = 4


@pytest.mark.timeout(900)
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_a_broken_rule_is_found(mutant: type[Mutant]) -> None:
    words = tuple(mutant.found_as)  # type: ignore[union-attr]
    found = any(told.startswith(words) for told in violations(mutant, SEEDS_MAX))
    assert found, f"{SEEDS_MAX} seeds didn't find {mutant.__name__}: {mutant.__doc__}"


def test_most_are_looked_for_among_the_first_seeds_of_make_sim() -> None:
    rare = [mutant for mutant in MUTANTS if hasattr(mutant, "among") or hasattr(mutant, "mix")]
    assert len(rare) <= RARE_MAX
    for mutant in MUTANTS:
        first = sorted(seeds_for(mutant, SEEDS_MAX)) == list(range(SEEDS_MAX))
        assert first or mutant in rare
