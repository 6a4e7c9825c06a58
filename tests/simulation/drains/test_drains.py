"""Whole drains under seeded faults; a failing seed replays alone: `World(seed, Faults()).run()`."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable

import msgspec
import pytest

from node_agent.drain import vocabulary as v
from node_agent.drain.machine import DrainMachine
from node_agent.drain.resources import Drain, DrainState, Move, MoveState, Operation
from tests.simulation.drains.faults import Faults
from tests.simulation.drains.world import World

SEEDS = 250
NO_FAULTS = Faults(
    coordinator_dies=0,
    node_dies=0,
    migration_fails=0,
    refused=0,
    request_lost=0,
    boot_fails=0,
    arrives_late=0,
)


def play(
    seeds: range, faults: Faults, operation: Operation = Operation.DRAIN, **options: object
) -> tuple[Counter[DrainState], Counter[str]]:
    """The ends, and what happened on the way. AssertionError names the seed."""
    ends: Counter[DrainState] = Counter()
    seen: Counter[str] = Counter()
    for seed in seeds:
        world = World(seed, faults, operation, **options)  # type: ignore[arg-type]
        try:
            world.run()
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}") from error
        ends[world.record.state] += 1
        seen += world.seen
    return ends, seen


def test_without_faults_every_drain_is_done_and_only_the_blocked_stay() -> None:
    for seed in range(60):
        world = World(seed, NO_FAULTS)
        world.run()
        expected = DrainState.PARTIAL if world.record.exclude else DrainState.DONE
        assert world.record.state is expected, seed
        ended = {move.state for move in world.record.moves}
        assert ended <= {MoveState.MOVED, MoveState.STOPPED}, seed


def test_drains_hold_their_promises_under_faults() -> None:
    ends, seen = play(range(SEEDS), Faults())
    assert ends[DrainState.DONE] > SEEDS / 3
    assert ends[DrainState.PARTIAL] > 0
    for what in (
        "coordinator dies",
        "node dies",
        "migration fails",
        "refused",
        "request lost",
        "answer lost",
        "arrival",
        "boot fails",
    ):
        assert seen[what] > 10, f"{what}: {seen}"


class _Hasty(DrainMachine):
    """Judges nodes by heartbeats from before the outage."""

    def handle(self, event: v.Event, now: float) -> list[v.Command]:
        if isinstance(event, (v.Tick, v.Took)):
            event = msgspec.structs.replace(event, unheard={})
        if isinstance(event, v.NotYet):
            event = v.Refused(domain=event.domain, reason=event.reason, elsewhere=True)
        return super().handle(event, now)


def test_after_a_total_outage_every_node_is_heard_before_a_move_is_given_up() -> None:
    faults = dataclasses.replace(NO_FAULTS, outage=0.1)
    for operation in (Operation.DRAIN, Operation.UNDRAIN):
        given_up: Counter[type[DrainMachine]] = Counter()
        for machine in (DrainMachine, _Hasty):
            outages = 0
            for seed in range(60):
                world = World(seed, faults, operation, make=machine)
                world.run()
                outages += world.seen["outage"]
                ends = {MoveState.FAILED, MoveState.LEFT}
                given_up[machine] += sum(move.state in ends for move in world.record.moves)
            assert outages > 50
        assert given_up[DrainMachine] == 0
        assert given_up[_Hasty] > 0, "else this shows nothing"


def test_guests_that_leave_already_are_waited_for_or_planned_again() -> None:
    ends, seen = play(range(150), Faults(leaving_already=0.3))
    assert seen["leaving already"] > 100
    assert ends[DrainState.DONE] > 50
    ends, _ = play(range(150), Faults(leaving_already=0.3, cancelled=0.05))
    assert ends[DrainState.CANCELLED] > 20


def test_undrains_hold_them_too() -> None:
    ends, _ = play(range(100), Faults(), Operation.UNDRAIN)
    assert ends[DrainState.DONE] > 30


def test_cancelled_drains_end_and_open_the_node() -> None:
    ends, seen = play(range(120), Faults(cancelled=0.1))
    assert ends[DrainState.CANCELLED] > 20
    assert seen["cancel abort"] > 5
    assert seen["cancel let-end"] > 5


class _Forgetful(DrainMachine):
    """Takes over without looking: what was under way is begun anew."""

    def __init__(self, drain: Drain) -> None:
        waiting = tuple(
            msgspec.structs.replace(move, state=MoveState.WAITING) if move.state.active else move
            for move in drain.moves
        )
        super().__init__(msgspec.structs.replace(drain, moves=waiting))


class _Credulous(DrainMachine):
    """Calls the node empty when its own moves are over."""

    def _react(self, event: v.Event, now: float) -> None:
        if isinstance(event, v.Checked):
            event = v.Checked(owned=(), processes=())
        super()._react(event, now)


class _Stubborn(DrainMachine):
    """Tries again where it has failed, for ever."""

    def handle(self, event: v.Event, now: float) -> list[v.Command]:
        commands = super().handle(event, now)
        for move in self._moves.all():
            if move.state is MoveState.FAILED:
                self._put(move, state=MoveState.WAITING, failures=move.failures + 1)
        return commands


class _Careless(DrainMachine):
    """Calls gone what it has powered off itself, and what its node didn't start."""

    def _failed(self, move: Move, error: str, now: float) -> None:
        if move.powered_off:
            self._end(move, MoveState.GONE, now)
        else:
            super()._failed(move, error, now)


@pytest.mark.parametrize("mutant", [_Credulous, _Stubborn, _Careless])
def test_the_invariants_catch_a_wrong_machine(mutant: Callable[[Drain], DrainMachine]) -> None:
    with pytest.raises(AssertionError, match="seed"):
        play(range(SEEDS), Faults(), make=mutant)
