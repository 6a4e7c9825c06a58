"""The checkers can fail: each rule, broken on purpose, is found, and by the right invariant."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from tests.simulation.mutants import MUTANTS, Mutant, aims, play_mutant
from tests.simulation.world import InvariantViolation

SEEDS_MAX = 2_000
"""Of these each is found; the search ends with the first, which is most often among the first ten.
Each seed is played with its own faults, and with kills around the switchover alone; or with those
that the mutant names."""


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Production code warns of what the simulation does to it."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_a_broken_rule_is_found(mutant: type[Mutant]) -> None:
    words = tuple(mutant.found_as)  # type: ignore[union-attr]
    first: int = getattr(mutant, "first_seed", 0)
    for seed in (*range(first, SEEDS_MAX), *range(first)):
        for faults in aims(mutant):
            try:
                play_mutant(mutant, seed, faults)
            except InvariantViolation as error:
                if str(error).startswith(words):
                    return
    pytest.fail(f"{SEEDS_MAX} seeds didn't find {mutant.__name__}: {mutant.__doc__}")
