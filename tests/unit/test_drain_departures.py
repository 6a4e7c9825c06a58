"""The drain's machine, of domains that are leaving already: waited for, or planned again."""

from __future__ import annotations

import pytest

from migrator.model import MigrationState
from node_agent.cli.drain_text import outcome
from node_agent.drain import vocabulary as v
from node_agent.drain.machine import DrainMachine
from node_agent.drain.resources import CancelMode, DrainState, Move, MoveState
from node_agent.hooks.model import HookPoint
from tests.unit.test_drain_machine import drain, migration, of

ALREADY = Move(
    domain="a",
    source="n1",
    destination="n2",
    state=MoveState.MOVING,
    migration="m-a",
    started_at_s=0.0,
    already=True,
)


def begun(state: MigrationState = MigrationState.PRECOPY) -> DrainMachine:
    """Of a drain that has looked at it once."""
    machine = DrainMachine(drain(moves=(ALREADY,), term=1))
    assert of(v.Look, machine.handle(v.Took(), 0.0)) == [v.Look(domain="a", migration="m-a")]
    looked = v.Looked(domain="a", owner="n1", migration=migration("a", state))
    assert v.Follow(domain="a", migration="m-a") in machine.handle(looked, 0.1)
    return machine


def seen(state: MigrationState, **changes: object) -> v.Seen:
    return v.Seen(domain="a", migration=migration("a", state, **changes))


def test_it_is_waited_for_and_said_to_be() -> None:
    machine = begun()
    on_its_way = "a, on its way to n2 already (migration m-a)"
    assert machine.drain.history[-1].text == f"{on_its_way}: that is waited for"
    assert machine.waits_for(0.2) == on_its_way


def test_it_counts_as_done_and_no_undrain_brings_it_back() -> None:
    machine = begun()
    commands = machine.handle(seen(MigrationState.COMPLETED), 1.0)
    assert of(v.Check, commands)
    assert machine.drain.moves[0].state is MoveState.GONE
    machine.handle(v.Checked(owned=(), processes=()), 1.1)
    machine.handle(v.HookDone(point=HookPoint.NODE_DRAINED), 1.2)
    assert machine.drain.state is DrainState.DONE
    assert "1 of 1 domain" in outcome(machine.drain)


def test_its_cap_is_left_as_its_user_wants_it() -> None:
    machine = begun()
    assert not of(v.Limit, machine.handle(seen(MigrationState.PRECOPY), 0.3))


def test_one_that_has_ended_before_the_first_look_is_done_with() -> None:
    machine = DrainMachine(drain(moves=(ALREADY,), term=1))
    machine.handle(v.Took(), 0.0)
    ended = migration("a", MigrationState.COMPLETED)
    machine.handle(v.Looked(domain="a", owner="n2", migration=ended), 0.1)
    assert machine.drain.moves[0].state is MoveState.GONE


@pytest.mark.parametrize("state", [MigrationState.FAILED, MigrationState.CANCELLED])
def test_one_that_comes_to_nothing_is_planned_again(state: MigrationState) -> None:
    machine = begun()
    commands = machine.handle(seen(state, error="the link broke", cancelled_by="user ann"), 1.0)
    (seek,) = of(v.Seek, commands)
    assert seek == v.Seek(domain="a", tried=()), "where it was going is no worse than others"
    (move,) = machine.drain.moves
    assert (move.already, move.failures, move.migration) == (False, 0, None)
    found = v.Found(domain="a", destination="n2", wire_bytes=1)
    (begin,) = of(v.Begin, machine.handle(found, 1.1))
    assert isinstance(begin, v.Begin) and begin.destination == "n2"


def test_so_is_one_that_had_failed_before_the_first_look() -> None:
    machine = DrainMachine(drain(moves=(ALREADY,), term=1))
    machine.handle(v.Took(), 0.0)
    ended = migration("a", MigrationState.FAILED, error="the link broke")
    commands = machine.handle(v.Looked(domain="a", owner="n1", migration=ended), 0.1)
    assert of(v.Seek, commands) == [v.Seek(domain="a", tried=())]


@pytest.mark.parametrize("mode", [CancelMode.LET_END, CancelMode.ABORT])
def test_a_cancelled_drain_leaves_it_alone(mode: CancelMode) -> None:
    machine = begun()
    commands = machine.handle(v.CancelAsked(mode=mode, by="user ann"), 0.5)
    assert not of(v.CancelMigration, commands)
    (move,) = machine.drain.moves
    assert move.state is MoveState.LEFT
    assert move.error == (
        "cancelled by user ann; its migration m-a, which isn't the drain's, goes on"
    )
    assert of(v.RunHook, commands), "and the node is opened"
    assert machine.drain.state is DrainState.CANCELLING
