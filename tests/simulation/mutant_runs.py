"""Clusters whose code is broken on purpose (see `mutants`), and the seeds that find it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import TypeVar

from migrator.journal_entry import JournalEntry
from migrator.model import MigrationRequest
from migrator.session import messages as m
from migrator.session.destination import DestinationSession
from migrator.session.source import SourceSession
from tests.simulation.faults import NAMED, name_of
from tests.simulation.node import Node
from tests.simulation.scenario import play
from tests.simulation.side import NodeSession, Sessions, Side
from tests.simulation.world import Faults, InvariantViolation

T = TypeVar("T")
Mutant = SourceSession | DestinationSession | Sessions | Node


class MutantSessions(Sessions):
    """Sessions that are `mutant`s where that is their role, also after a restart."""

    def __init__(self, mutant: type[NodeSession]) -> None:
        self._mutant = mutant

    def _mutate(self, session: T) -> T:
        if isinstance(session, self._mutant.__mro__[1]):
            session.__class__ = self._mutant  # type: ignore[assignment]
        return session

    def source(self, side: Side, token: int, request: MigrationRequest) -> SourceSession:
        return self._mutate(super().source(side, token, request))

    def destination(self, side: Side, prepare: m.Prepare) -> DestinationSession:
        return self._mutate(super().destination(side, prepare))

    def restored(self, side: Side, entry: JournalEntry) -> NodeSession:
        return self._mutate(super().restored(side, entry))


def play_mutant(mutant: type[Mutant], seed: int, faults: Faults | None = None) -> None:
    """Play a seed in a cluster whose code is broken in that way. Raises InvariantViolation."""
    mix: str | None = getattr(mutant, "mix", None)
    faults = faults if mix is None else NAMED[mix]
    if issubclass(mutant, Node):
        play(seed, faults=faults, make_node=mutant)
    elif issubclass(mutant, Sessions):
        play(seed, faults=faults, sessions=mutant())
    else:
        play(seed, faults=faults, sessions=MutantSessions(mutant))


def violations(mutant: type[Mutant], count: int, faults: Faults | None = None) -> Iterator[str]:
    """What `count` seeds violate, in words, as they are played; printed with the seed."""
    for seed in seeds_for(mutant, count):
        try:
            play_mutant(mutant, seed, faults)
        except InvariantViolation as error:
            print(f"{mutant.__name__}, seed {seed}: {error}"[:200])
            yield str(error)


def first_violation(mutant: type[Mutant], count: int, faults: Faults) -> str:
    """Under faults of one's own. AssertionError: none of the seeds finds it."""
    first = next(violations(mutant, count, faults), None)
    assert first is not None, f"{count} seeds didn't find {mutant.__name__}: {mutant.__doc__}"
    return first


def seeds_for(mutant: type[Mutant], count: int) -> list[int]:
    """`count` seeds of `make sim` that the mutant is looked for in: the first, or those `among`."""
    among: str | None = getattr(mutant, "among", None)
    first: int = getattr(mutant, "first_seed", 0)
    fitting = (seed for seed in itertools.count() if among is None or name_of(seed) == among)
    seeds = list(itertools.islice(fitting, count))
    return [seed for seed in seeds if seed >= first] + [seed for seed in seeds if seed < first]
