"""The drain's machine, one decision at a time. Whole drains, under faults: tests/simulation."""

from __future__ import annotations

import msgspec
import pytest

from migrator.model import (
    MaintenancePolicy,
    Migration,
    MigrationProgress,
    MigrationRequest,
    MigrationState,
    NodeState,
)
from node_agent.drain import vocabulary as v
from node_agent.drain.machine import DrainMachine
from node_agent.drain.resources import CancelMode, Drain, DrainState, Move, MoveState, Operation
from node_agent.hooks.model import HookPoint

LINKS = {"n1": 100e6, "n2": 100e6, "n3": 100e6}


def drain(*names: str, parallel: int = 2, **changes: object) -> Drain:
    values: dict[str, object] = {
        "id": "d",
        "operation": Operation.DRAIN,
        "node": "n1",
        "state": DrainState.RUNNING,
        "created_at_s": 0.0,
        "started_at_s": 0.0,
        "hooked": True,
        "parallel": parallel,
        "links": LINKS,
        "moves": tuple(
            Move(domain=name, source="n1", destination="n2", planned_start_s=float(at))
            for at, name in enumerate(names)
        ),
    }
    return Drain(**(values | changes))  # type: ignore[arg-type]


def migration(domain: str, state: MigrationState, **changes: object) -> Migration:
    values: dict[str, object] = {
        "id": f"m-{domain}",
        "domain": domain,
        "source": "n1",
        "destination": "n2",
        "request": MigrationRequest(destination="n2"),
        "state": state,
        "progress": MigrationProgress(state=state),
        "created_at_s": 0.0,
    }
    return Migration(**(values | changes))  # type: ignore[arg-type]


def of(kind: type[v.Command], commands: list[v.Command]) -> list[v.Command]:
    return [each for each in commands if isinstance(each, kind)]


def moving(machine: DrainMachine, domain: str) -> list[v.Command]:
    """Its migration has begun and sends."""
    event = migration(domain, MigrationState.SETUP)
    machine.handle(v.Accepted(domain=domain, migration=event), 0.1)
    return machine.handle(
        v.Seen(domain=domain, migration=migration(domain, MigrationState.PRECOPY)), 0.2
    )


def test_as_many_begin_as_were_planned_and_they_share_the_link() -> None:
    machine = DrainMachine(drain("a", "b", "c"))
    begun = of(v.Begin, machine.handle(v.Took(), 0.0))
    assert [each.domain for each in begun if isinstance(each, v.Begin)] == ["a", "b"]
    moving(machine, "a")
    limits = of(v.Limit, moving(machine, "b"))
    assert v.Limit(migration="m-a", bandwidth_bytes_per_s=80_000_000) in limits
    assert machine.drain.moves[1].bandwidth_bytes_per_s == 20_000_000
    done = machine.handle(
        v.Seen(domain="a", migration=migration("a", MigrationState.COMPLETED)), 1.0
    )
    assert of(v.Begin, done)
    # The next is still being set up: until it sends, the link is b's alone.
    assert v.Limit(migration="m-b", bandwidth_bytes_per_s=100_000_000) in done


def test_what_is_noted_of_a_balancing_names_no_node() -> None:
    told = DrainMachine(drain(operation=Operation.BALANCE, node="")).handle(v.Took(), 0.0)
    assert str(told[0]).count("balance has begun, coordinated by") == 1


def test_who_asked_for_a_drain_and_why_is_told_when_it_begins() -> None:
    asked = drain(coordinator="n2", term=1, asked_by="user ann", reason="new disk")
    told = DrainMachine(asked).handle(v.Took(), 0.0)
    text = "drain of n1 has begun, coordinated by n2, asked for by user ann: new disk"
    assert v.Tell(text=text) in told


def test_a_destination_takes_no_more_than_its_lanes() -> None:
    crowded = msgspec.structs.replace(drain("a", "b", "c"), parallel=3, lanes={"n2": 2})
    machine = DrainMachine(crowded)
    begun = of(v.Begin, machine.handle(v.Took(), 0.0))
    assert [each.domain for each in begun if isinstance(each, v.Begin)] == ["a", "b"]
    moving(machine, "a")
    over = v.Seen(domain="a", migration=migration("a", MigrationState.COMPLETED))
    assert of(v.Begin, machine.handle(over, 1.0))


def test_the_hook_comes_before_the_first_move_and_may_forbid() -> None:
    machine = DrainMachine(drain("a", hooked=False))
    commands = machine.handle(v.Took(), 0.0)
    assert of(v.RunHook, commands)
    assert not of(v.Begin, commands)
    done = v.HookDone(point=HookPoint.NODE_DRAINING, error="not now")
    commands = machine.handle(done, 1.0)
    states = [machine.drain.state]
    assert machine.drain.error == "not now"
    assert commands[-2:] == [
        v.SetCordon(state=NodeState.READY),
        v.RunHook(point=HookPoint.NODE_OPENED),
    ]
    machine.handle(v.HookDone(point=HookPoint.NODE_OPENED), 2.0)
    assert [*states, machine.drain.state] == [DrainState.CANCELLING, DrainState.CANCELLED]


def test_it_is_not_done_before_the_node_is_empty() -> None:
    machine = DrainMachine(drain("a"))
    machine.handle(v.Took(), 0.0)
    moving(machine, "a")
    over = v.Seen(domain="a", migration=migration("a", MigrationState.COMPLETED))
    assert of(v.Check, machine.handle(over, 1.0))
    machine.handle(v.Checked(owned=(), processes=("a",)), 2.0)
    states = [machine.drain.state]
    machine.handle(v.Checked(owned=(), processes=(), incoming=("b",)), 3.0)
    states.append(machine.drain.state)
    commands = machine.handle(v.Checked(owned=("b",), processes=("b",)), 4.0)
    states.append(machine.drain.state)
    assert states == [DrainState.CHECKING, DrainState.CHECKING, DrainState.RUNNING]
    assert of(v.Seek, commands), "what has come in the meantime moves, too"


def test_a_search_that_a_cancel_made_needless_holds_up_no_other() -> None:
    """What was powered off, and wanted a place, stayed off, and the drain never ended."""
    off = Move(
        domain="off", source="n1", destination="n2", policy=MaintenancePolicy.STOP, powered_off=True
    )
    moves = (
        Move(domain="a", source="n1", destination="n2", state=MoveState.SEEKING),
        msgspec.structs.replace(off, state=MoveState.BOOTING),
    )
    machine = DrainMachine(drain(moves=moves))
    assert of(v.Seek, machine.handle(v.Took(), 0.0)) == [v.Seek(domain="a", tried=())]
    machine.handle(v.CancelAsked(mode=CancelMode.ABORT), 0.1)
    assert not of(v.Seek, machine.handle(v.Failed(domain="off", error="no", node="n2"), 0.2))
    found = v.Found(domain="a", destination="n3", wire_bytes=1)
    assert of(v.Seek, machine.handle(found, 0.3)) == [v.Seek(domain="off", tried=("n2",))]


def test_a_failed_move_is_tried_elsewhere_once() -> None:
    machine = DrainMachine(drain("a"))
    machine.handle(v.Took(), 0.0)
    moving(machine, "a")
    failed = migration("a", MigrationState.FAILED, error="it didn't converge")
    commands = machine.handle(v.Seen(domain="a", migration=failed), 1.0)
    assert commands[-1] == v.Seek(domain="a", tried=("n2",))
    machine.handle(v.Found(domain="a", destination="n3", wire_bytes=1), 2.0)
    again = migration("a", MigrationState.FAILED, id="m2", destination="n3", error="again")
    machine.handle(v.Accepted(domain="a", migration=again), 3.0)
    machine.handle(v.Seen(domain="a", migration=again), 4.0)
    (move,) = machine.drain.moves
    assert (move.state, move.error) == (MoveState.FAILED, "again")
    machine.handle(v.Checked(owned=("a",), processes=("a",)), 5.0)
    assert machine.drain.state is DrainState.PARTIAL


def test_a_silent_destination_is_given_up_before_the_handoff_only() -> None:
    for phase, given_up in ((MigrationState.PRECOPY, True), (MigrationState.HANDOFF, False)):
        machine = DrainMachine(drain("a"))
        machine.handle(v.Took(), 0.0)
        moving(machine, "a")
        machine.handle(v.Seen(domain="a", migration=migration("a", phase)), 1.0)
        silent = v.Tick(unreachable=frozenset({"n2"}))
        machine.handle(silent, 2.0)
        commands = machine.handle(silent, 20.0)
        because = "because n2 fell silent"
        wanted = [v.CancelMigration(migration="m-a", because=because)] if given_up else []
        assert of(v.CancelMigration, commands) == wanted


def test_whoever_takes_over_looks_first() -> None:
    before = drain("a", "b")
    under_way = msgspec.structs.replace(before.moves[0], state=MoveState.STARTING, attempts=1)
    machine = DrainMachine(msgspec.structs.replace(before, moves=(under_way, before.moves[1])))
    commands = machine.handle(v.Took(), 5.0)
    assert of(v.Look, commands) == [v.Look(domain="a", migration=None)]
    begun = [each.domain for each in commands if isinstance(each, v.Begin)]
    assert begun == ["b"]
    machine.handle(v.Looked(domain="a", owner="n2"), 6.0)
    assert machine.drain.moves[0].state is MoveState.MOVED


def test_an_undrain_has_not_brought_back_what_others_take_elsewhere() -> None:
    """It followed their migration to its end, and said "moved"."""
    back = [Move(domain=name, source="n3", destination="n1") for name in ("a", "b")]
    machine = DrainMachine(drain(operation=Operation.UNDRAIN, moves=tuple(back)))
    machine.handle(v.Took(), 0.0)
    for name in ("a", "b"):
        machine.handle(v.Unclear(domain=name, reason="it is being migrated already"), 1.0)
    theirs = migration("a", MigrationState.PRECOPY, source="n3", destination="n2")
    machine.handle(v.Looked(domain="a", owner="n3", migration=theirs), 2.0)
    machine.handle(v.Looked(domain="b", owner="n2"), 2.0)
    machine.handle(v.HookDone(point=HookPoint.NODE_OPENED), 3.0)
    assert [(each.state, each.error) for each in machine.drain.moves] == [
        (MoveState.LEFT, "migration m-a takes it to n2 meanwhile"),
        (MoveState.LEFT, "it was moved on to n2 meanwhile"),
    ]
    assert machine.drain.state is DrainState.PARTIAL


def test_cancelling_lets_end_what_is_under_way() -> None:
    machine = DrainMachine(drain("a", "b", parallel=1))
    machine.handle(v.Took(), 0.0)
    moving(machine, "a")
    commands = machine.handle(v.CancelAsked(mode=CancelMode.LET_END, by="user x"), 1.0)
    assert not of(v.CancelMigration, commands)
    commands = machine.handle(v.CancelAsked(mode=CancelMode.ABORT, by="root on n2"), 2.0)
    assert of(v.CancelMigration, commands) == [
        v.CancelMigration(migration="m-a", because="which root on n2 cancelled")
    ]
    assert machine.drain.cancelled_by == "root on n2"
    machine.handle(v.Seen(domain="a", migration=migration("a", MigrationState.CANCELLED)), 3.0)
    machine.handle(v.HookDone(point=HookPoint.NODE_OPENED), 3.0)
    assert machine.drain.state is DrainState.CANCELLED
    assert {move.state for move in machine.drain.moves} == {MoveState.LEFT}


def test_after_its_time_nothing_begins() -> None:
    machine = DrainMachine(drain("a", "b", parallel=1, timeout_s=10.0))
    machine.handle(v.Took(), 0.0)
    moving(machine, "a")
    over = v.Seen(domain="a", migration=migration("a", MigrationState.COMPLETED))
    assert not of(v.Begin, machine.handle(over, 11.0))
    assert machine.drain.moves[1].state is MoveState.LEFT


def stopping() -> DrainMachine:
    """A machine whose one domain has been powered off, to be started on n2."""
    machine = about_to_stop("n2")
    commands = machine.handle(v.PoweredOff(domain="a"), 1.0)
    assert commands == [v.Boot(domain="a", node="n2")]
    return machine


def about_to_stop(destination: str | None) -> DrainMachine:
    move = Move(domain="a", source="n1", destination=destination, policy=MaintenancePolicy.STOP)
    machine = DrainMachine(drain(moves=(move,)))
    machine.handle(v.Took(), 0.0)
    return machine


@pytest.mark.parametrize("destination", ["n2", None])
@pytest.mark.parametrize("forced", [True, False])
def test_the_history_says_that_a_guest_was_ended_by_force(
    destination: str | None, forced: bool
) -> None:
    machine = about_to_stop(destination)
    machine.handle(v.PoweredOff(domain="a", forced=forced), 61.0)
    noted = {(note.at_s, note.domain, note.text) for note in machine.drain.history}
    by_force = (61.0, "a", "a was ended by force: it didn't power itself off in time")
    assert (by_force in noted) is forced


def test_what_was_powered_off_is_started_on_whichever_node_takes_it() -> None:
    """It was called gone ("it doesn't run any more") where its first node didn't start it."""
    machine = stopping()
    refused = v.Failed(domain="a", error="not enough memory", node="n2")
    assert v.Seek(domain="a", tried=("n2",)) in machine.handle(refused, 2.0)
    machine.handle(v.Looked(domain="a", owner=None), 2.5)
    states = [machine.drain.moves[0].state]
    found = v.Found(domain="a", destination="n3", wire_bytes=0)
    assert v.Boot(domain="a", node="n3") in machine.handle(found, 3.0)
    machine.handle(refused, 3.5)
    states.append(machine.drain.moves[0].state)
    machine.handle(v.Booted(domain="a", node="n3"), 4.0)
    states.append(machine.drain.moves[0].state)
    assert states == [MoveState.SEEKING, MoveState.BOOTING, MoveState.MOVED], "n3 isn't n2"


def test_what_no_node_starts_is_left_off_and_said_to_be() -> None:
    machine = stopping()
    machine.handle(v.CancelAsked(mode=CancelMode.LET_END), 1.5)
    machine.handle(v.Failed(domain="a", error="not enough memory", node="n2"), 2.0)
    assert machine.drain.moves[0].state is MoveState.SEEKING, "a cancel doesn't leave it off"
    machine.handle(v.NoPlace(domain="a", reason="no node can take it"), 3.0)
    (move,) = machine.drain.moves
    assert (move.state, move.is_off) == (MoveState.FAILED, True)
    assert move.error == (
        "it is powered off, and was started nowhere else: not enough memory; no node can take it"
    )


def test_a_start_on_a_node_that_fell_silent_is_tried_elsewhere() -> None:
    machine = stopping()
    silent = v.Tick(unreachable=frozenset({"n2"}))
    assert not machine.handle(silent, 2.0)
    assert v.Seek(domain="a", tried=("n2",)) in machine.handle(silent, 12.0)


def test_nothing_is_asked_of_a_silent_source_until_it_is_back() -> None:
    """Each request to it would cost one of ten attempts, and they were over in ten seconds."""
    machine = DrainMachine(drain("a", "b", parallel=1))
    machine.handle(v.Tick(unreachable=frozenset({"n1"})), 0.0)
    assert not of(v.Begin, machine.handle(v.Took(), 0.1))
    assert of(v.Begin, machine.handle(v.Tick(), 20.0)), "it is back"
    machine = DrainMachine(drain("a", "b", parallel=1))
    machine.handle(v.Tick(unreachable=frozenset({"n1"})), 0.0)
    machine.handle(v.Took(), 0.1)
    machine.handle(v.Tick(unreachable=frozenset({"n1"})), 61.0)
    assert {move.state for move in machine.drain.moves} == {MoveState.FAILED}


def test_a_cancel_waits_for_no_hook_that_was_asked_whether_it_may_begin() -> None:
    machine = DrainMachine(drain("a", hooked=False))
    machine.handle(v.Took(), 0.0)
    assert machine.waits_for(7.0) == "the hooks of node-draining, for 7 s now"
    commands = machine.handle(v.CancelAsked(mode=CancelMode.LET_END), 8.0)
    assert commands[-1] == v.RunHook(point=HookPoint.NODE_OPENED)
    late = v.HookDone(point=HookPoint.NODE_DRAINING, error="no")
    assert machine.handle(late, 8.5) == []
    machine.handle(v.HookDone(point=HookPoint.NODE_OPENED), 9.0)
    assert (machine.drain.state, machine.drain.error) == (DrainState.CANCELLED, None)


def test_who_hears_of_a_drain_hears_when_the_node_is_open_again() -> None:
    machine = DrainMachine(drain("a", operation=Operation.UNDRAIN))
    machine.handle(v.Took(), 0.0)
    moving(machine, "a")
    over = v.Seen(domain="a", migration=migration("a", MigrationState.COMPLETED))
    commands = machine.handle(over, 1.0)
    assert commands[-1] == v.RunHook(point=HookPoint.NODE_OPENED)
    machine.handle(v.CancelAsked(mode=CancelMode.LET_END), 1.5)
    machine.handle(v.HookDone(point=HookPoint.NODE_OPENED, error="nobody answers"), 2.0)
    assert machine.drain.state is DrainState.DONE, "a cancel comes too late, a hook is only noted"
    assert "nobody answers" in "".join(note.text for note in machine.drain.history)


def test_what_is_waited_for_is_told() -> None:
    machine = DrainMachine(drain("a", "b"))
    machine.handle(v.Took(), 0.0)
    moving(machine, "a")
    assert machine.waits_for(1.0) == ""
    silent = migration("a", MigrationState.PRECOPY)
    progress = msgspec.structs.replace(silent.progress, unheard_s=9.2)
    quiet = msgspec.structs.replace(silent, progress=progress)
    machine.handle(v.Seen(domain="a", migration=quiet), 1.5)
    assert machine.waits_for(1.5) == "a's engine, not heard for 9 s"
    machine.handle(v.Seen(domain="a", migration=silent), 1.6)
    machine.handle(v.Tick(unreachable=frozenset({"n2"})), 2.0)
    assert machine.waits_for(6.0) == "n2, which is silent (given up in 6 s)"
    machine.handle(v.Tick(), 7.0)
    refused = v.Refused(domain="b", reason="node n2: full", elsewhere=True)
    machine.handle(refused, 7.0)
    assert machine.waits_for(7.0) == "another place for b"
    machine.handle(v.CancelAsked(mode=CancelMode.LET_END), 8.0)
    assert "`ferry drains cancel d --abort-moves` ends it" in machine.waits_for(8.0)
    machine = DrainMachine(drain())
    machine.handle(v.Took(), 0.0)
    machine.handle(v.Checked(owned=(), processes=(), incoming=("c",)), 1.0)
    assert machine.waits_for(10.0) == "n1 to be empty: on their way there: c"
    machine.handle(v.Checked(owned=(), processes=("c",)), 11.0)
    assert "processes are still there: c, for at most 49 s more" in machine.waits_for(12.0)


def test_moves_of_another_drain_to_the_same_node_share_its_link_and_its_lanes() -> None:
    """Two nodes that were drained at once each sent at the whole speed of n2's link."""
    machine = DrainMachine(drain("a", "b", parallel=1, lanes={"n2": 2}))
    machine.handle(v.Took(), 0.0)
    moving(machine, "a")
    assert machine.drain.moves[0].bandwidth_bytes_per_s == 100_000_000
    theirs = Move(
        domain="z", source="n3", destination="n2", state=MoveState.MOVING, remaining_bytes=1
    )
    machine.handle(v.Tick(others=(theirs,)), 1.0)
    assert machine.drain.moves[0].bandwidth_bytes_per_s == 50_000_000
    over = v.Seen(domain="a", migration=migration("a", MigrationState.COMPLETED))
    machine.handle(v.Tick(others=(theirs, theirs)), 2.0)
    assert not of(v.Begin, machine.handle(over, 3.0)), "n2 has no core left for another one"
    assert of(v.Begin, machine.handle(v.Tick(), 4.0))


def test_a_node_that_gives_no_answer_to_a_start_is_left_for_another_one() -> None:
    """In a lab its agent was killed: ten tries were over before it was known to be silent."""
    machine = stopping()
    asked: list[v.Command] = []
    for second in range(2, 5):
        machine.handle(v.Unclear(domain="a", reason="refused"), float(second))
        asked += machine.handle(v.Looked(domain="a", owner=None), float(second))
    again = v.Boot(domain="a", node="n2")
    assert [each for each in asked if not isinstance(each, v.Tell)] == [
        again,
        again,
        v.Seek(domain="a", tried=("n2",)),
    ]
    machine.handle(v.Looked(domain="a", owner="n2"), 9.0)
    assert machine.drain.moves[0].state is MoveState.MOVED, "it had started it"


def test_what_is_still_on_its_way_there_is_waited_for_however_large_it_is() -> None:
    """After a minute the node was called left, though the guest had only to arrive and move on."""
    machine = DrainMachine(drain(timeout_s=600.0))
    machine.handle(v.Took(), 0.0)
    coming = v.Checked(owned=(), processes=(), incoming=("big",))
    states = []
    for second in (1.0, 300.0, 480.0, 580.0):
        machine.handle(coming, second)
        states.append(machine.drain.state)
    machine.handle(v.Checked(owned=("big",), processes=("big",)), 590.0)
    states.append(machine.drain.state)
    assert states == [DrainState.CHECKING] * 4 + [DrainState.RUNNING]
    machine = DrainMachine(drain(timeout_s=10.0))
    machine.handle(v.Took(), 0.0)
    machine.handle(coming, 1.0)
    machine.handle(coming, 80.0)
    assert machine.drain.state is DrainState.PARTIAL, "its own time is over"
