"""What is left of a drain, by what its moves have taken so far."""

from __future__ import annotations

import msgspec
import pytest

from migrator.model import MaintenancePolicy
from node_agent.drain.outlook import left_s
from node_agent.drain.resources import Drain, DrainState, Move, MoveState, Operation


def drain(*moves: Move, state: DrainState = DrainState.RUNNING) -> Drain:
    return Drain(
        id="d",
        operation=Operation.DRAIN,
        node="n1",
        state=state,
        created_at_s=100.0,
        started_at_s=100.0,
        moves=moves,
    )


def planned(number: int, **changes: object) -> Move:
    """Two at once, a second each."""
    move = Move(
        domain=f"g{number}",
        source="n1",
        destination="n2",
        planned_start_s=float(number // 2),
        planned_s=1.0,
    )
    return msgspec.structs.replace(move, **changes)


def over(number: int, took_s: float) -> Move:
    began_s = 100.0 + number // 2 * took_s
    return planned(
        number,
        state=MoveState.MOVED,
        attempts=1,
        started_at_s=began_s,
        ended_at_s=began_s + took_s,
    )


def test_at_its_beginning_it_is_what_was_planned() -> None:
    assert left_s(drain(*map(planned, range(10))), 100.0) == pytest.approx(5.0)


def test_moves_that_take_longer_make_the_rest_longer() -> None:
    """As where two at once on busy processors take 1.7 times what one alone did."""
    told = drain(over(0, 1.7), over(1, 1.7), *map(planned, range(2, 10)))
    found = left_s(told, 101.7)
    assert found is not None
    assert found == pytest.approx(4.0 * 4.4 / 3.0)
    assert abs(1.7 + found - 8.5) / 8.5 < 0.15, "a first plan of 5 s was 41 % off"
    more = drain(*(over(number, 1.7) for number in range(6)), *map(planned, range(6, 10)))
    assert left_s(more, 105.1) == pytest.approx(3.4, rel=0.1)


def test_a_move_that_is_overdue_tells_before_it_ends() -> None:
    going = [
        planned(number, state=MoveState.MOVING, attempts=1, started_at_s=100.0)
        for number in range(2)
    ]
    rest = list(map(planned, range(2, 10)))
    early, late = (left_s(drain(*going, *rest), now_s) for now_s in (100.9, 104.0))
    assert early == pytest.approx(5.0)
    assert late == pytest.approx(5.0 * 3.0)


def test_what_was_waited_before_the_moves_prolongs_nothing() -> None:
    """A hook of a minute, in a drain of five seconds."""
    first = [
        planned(number, state=MoveState.MOVED, attempts=1, started_at_s=160.0, ended_at_s=161.0)
        for number in range(2)
    ]
    assert left_s(drain(*first, *map(planned, range(2, 10))), 161.0) == pytest.approx(4.0)


def test_half_a_transfer_is_half_a_move_and_a_powered_off_one_is_timed_by_its_like() -> None:
    half = planned(
        0,
        state=MoveState.MOVING,
        attempts=1,
        started_at_s=100.0,
        bytes_sent=50,
        remaining_bytes=50,
    )
    assert left_s(drain(half), 100.5) == pytest.approx(0.5)
    off = planned(1, planned_start_s=0.0, planned_s=20.0, policy=MaintenancePolicy.STOP)
    assert left_s(drain(half, off), 100.5) == pytest.approx(20.0)
    stopped = msgspec.structs.replace(
        off, state=MoveState.STOPPED, attempts=1, started_at_s=100.0, ended_at_s=102.0
    )
    assert left_s(drain(half, stopped), 102.0) == pytest.approx(0.75), "it is overdue by now"


def test_a_guest_that_doesn_t_power_itself_off_is_ended_by_force_and_no_later() -> None:
    """What was told grew by the second: 48 s left, one second before the end by force."""
    moves = [
        planned(
            number,
            planned_start_s=0.0,
            planned_s=20.0,
            policy=MaintenancePolicy.STOP,
            state=MoveState.STOPPING,
            attempts=1,
            started_at_s=100.0,
        )
        for number in range(2)
    ]
    told = [left_s(drain(*moves), now_s) for now_s in (100.0, 150.0, 159.0, 161.0)]
    assert told == pytest.approx([20.0, 13.0, 4.0, 3.0])
    booting = [msgspec.structs.replace(each, state=MoveState.BOOTING) for each in moves]
    assert left_s(drain(*booting), 161.0) == pytest.approx(3.0)
    for_good = [msgspec.structs.replace(each, destination=None) for each in moves]
    assert left_s(drain(*for_good), 161.0) == pytest.approx(0.0)


@pytest.mark.parametrize("state", [DrainState.CHECKING, DrainState.DONE])
def test_only_moves_are_timed(state: DrainState) -> None:
    assert left_s(drain(over(0, 1.0), state=state), 101.0) is None
    assert left_s(drain(), 101.0) is None
