"""What must hold in every drain, whatever fails: each function raises AssertionError."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from migrator.model import MaintenancePolicy
from node_agent.drain.resources import Drain, DrainState, MoveState
from node_agent.planner.model import DomainFacts

SOURCE = "n0"
"""The node that is emptied, or comes back."""


@dataclass(slots=True)
class Guest:
    """A domain of the simulation."""

    facts: DomainFacts
    owner: str
    running: bool = True
    moves: int = 0
    migration: str | None = None


def moved(guest: Guest, guests: Iterable[Guest]) -> None:
    """It has just arrived: for the first time, and beside nobody that a rule keeps it from."""
    name = guest.facts.name
    assert guest.moves <= 1, f"{name} was moved {guest.moves} times"
    for other in guests:
        if other is guest or not other.running or other.owner != guest.owner:
            continue
        if other.owner == SOURCE:
            continue  # Where all of them came from: what was together there may be again.
        rules = (
            (guest.facts.anti_affinity, other.facts),
            (other.facts.anti_affinity, guest.facts),
        )
        for anti, facts in rules:
            assert not set(anti) & facts.selectors, f"{name} is with {other.facts.name}"


def record(drain: Drain) -> None:
    """Tries are bounded, and no more moves are under way than were planned."""
    for move in drain.moves:
        assert move.failures <= 2 or move.powered_off, move
        assert move.attempts <= 10, move
    live = [
        move
        for move in drain.moves
        if move.state in (MoveState.STARTING, MoveState.MOVING)
        and move.policy is MaintenancePolicy.LIVE
        and not move.already
    ]
    by_source = Counter(move.source for move in live)
    assert all(count <= drain.parallel for count in by_source.values()), live


def told_off(drain: Drain, off: Collection[str]) -> None:
    """What runs nowhere now was to be off, or is told of as what couldn't be started."""
    moves = {move.domain: move for move in drain.moves}
    for name in off:
        wanted = moves[name].state is MoveState.STOPPED and moves[name].destination is None
        told = moves[name].state in (MoveState.FAILED, MoveState.LEFT) and moves[name].error
        assert wanted or told, f"{name} is off, and nobody says so: {moves[name]}"


def end(drain: Drain, here: Sequence[str], incoming: Collection[str], *, asked: bool) -> None:
    """Drained means empty; what is left is named. `here`: what runs on the node."""
    if drain.state is DrainState.DONE:
        assert not here, f"done, but {here} are there"
        assert not incoming, f"done, but {incoming} are on their way there"
    if drain.state is DrainState.PARTIAL and asked:
        told = {
            move.domain for move in drain.moves if move.state in (MoveState.FAILED, MoveState.LEFT)
        }
        assert set(here) <= told | set(drain.exclude), (here, told)
    assert all(move.state.ended for move in drain.moves)
