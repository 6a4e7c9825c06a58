"""Which drains an undrain undoes together: a node may be drained again before all are back."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import pytest

from migrator.model import DiskSpec, DomainSpec, DomainState, NodeState
from node_agent.cli.drain_text import outcome, plan_text, sentence
from node_agent.drain.resources import (
    Drain,
    DrainPlan,
    DrainState,
    Move,
    MoveState,
    Operation,
    PlanBlocker,
)
from node_agent.drain.survey import Survey, make_survey
from node_agent.drain.undrain import (
    HOME,
    carried_to,
    complete,
    continued,
    in_other_hands,
    plan,
    to_undo,
)
from node_agent.nodes import NodeView
from node_agent.planner.model import Plan, PlanOptions
from node_agent.planner.plan import plan_moves
from node_agent.resources import Domain
from tests.unit.heartbeats import heartbeat

S = DrainState
M = MoveState


def move(domain: str, state: MoveState = M.MOVED) -> Move:
    return Move(domain=domain, source="n1", destination="n2", state=state)


def drain(id: str, *moves: Move, **changes: object) -> Drain:
    values: dict[str, object] = {
        "id": id,
        "operation": Operation.DRAIN,
        "node": "n1",
        "state": S.DONE,
        "created_at_s": 1.0,
        "started_at_s": 1.0,
        "ended_at_s": 9.0,
        "moves": moves,
    }
    return Drain(**(values | changes))  # type: ignore[arg-type]


def undrain(id: str, *moves: Move, **changes: object) -> Drain:
    return drain(id, *moves, operation=Operation.UNDRAIN, **changes)


def names(drains: Sequence[Drain]) -> list[list[str]]:
    return [[each.domain for each in one.moves] for one in to_undo(drains, "n1")]


def test_a_drained_node_that_is_drained_again_loses_no_home() -> None:
    first = drain("d1", move("a"), move("b"))
    assert continued([first], "n1", cordoned_by="d1") == "d1"
    second = drain("d2", continues="d1")
    assert names([second, first]) == [[], ["a", "b"]]


def test_a_cancelled_drain_is_continued_though_the_node_was_open() -> None:
    first = drain("d1", move("a"), move("b", M.LEFT), state=S.CANCELLED)
    assert continued([first], "n1", cordoned_by=None) == "d1"
    second = drain("d2", move("b"), continues="d1")
    assert names([second, first]) == [["b"], ["a", "b"]]


def test_what_an_operator_has_opened_again_stays_away() -> None:
    first = drain("d1", move("a"))
    assert continued([first], "n1", cordoned_by=None) is None
    assert continued([first], "n1", cordoned_by="another") is None
    assert names([drain("d2", move("b")), first]) == [["b"]]


def test_what_has_come_back_is_undone_and_what_was_left_is_not() -> None:
    first = drain("d1", move("a"), move("b"), restored_by="u1")
    home = undrain("u1", move("a"), move("b"))
    assert names([home, first]) == []
    assert continued([home, first], "n1", cordoned_by=None) is None
    left = undrain("u1", move("a"), move("b", M.FAILED), state=S.PARTIAL)
    assert names([left, first]) == [["b"]]
    assert continued([left, first], "n1", cordoned_by=None) == "d1"
    second = drain("d2", move("a"), continues="d1")
    assert names([second, left, first]) == [["a"], ["b"]]


def test_drains_of_other_nodes_and_those_under_way_are_nothing_to_it() -> None:
    first = drain("d1", move("a"))
    other = drain("x", move("z"), node="n2")
    running = drain("d2", move("b", M.MOVING), state=S.RUNNING, ended_at_s=None, continues="d1")
    assert names([running, other, first]) == [["a"]]
    assert names([]) == []


def test_nobody_is_said_to_be_back_where_nobody_was_away() -> None:
    assert outcome(undrain("u1")) == "node n1 is open; nothing was brought back"
    empty = DrainPlan(node="n1", moves=())
    assert "nothing is to come back to node n1" in plan_text(empty, Operation.UNDRAIN)
    assert "nothing has to move" in plan_text(empty)


def test_what_another_drain_has_carried_on_comes_home_from_there() -> None:
    """n1 was drained to n2, and n2 to n3: an undrain of n1 left it as "moved on", and the one of n2
    brought it no further than n2."""
    first = drain("d1", first_move := move("a"))
    second = drain("d2", hop(M.MOVED, "n2", "n3"), node="n2")
    assert carried_to(first_move, [first]) == "n2"
    assert carried_to(first_move, [second, first]) == "n3"
    back = undrain("u2", hop(M.MOVED, "n3", "n2"), node="n2")
    assert carried_to(first_move, [back, second, first]) == "n2"
    failed = drain("d2", hop(M.FAILED, "n2", "n3"), node="n2")
    assert carried_to(first_move, [failed, first]) == "n2"
    evened = drain("b", hop(M.MOVED, "n2", "n3"), operation=Operation.BALANCE, node="")
    assert carried_to(first_move, [evened, first]) == "n2", "it is meant to be there"
    before = drain("d0", hop(M.MOVED, "n2", "n4"), node="n2")
    assert carried_to(first_move, [first, before]) == "n2", "that was earlier"


def test_what_another_undrain_has_brought_home_is_not_taken_from_there() -> None:
    """n1 was drained to n2, n2 to n3, and n1 was undrained first: the undrain of n2 took n1's
    guests to n2, and both said that they were done."""
    first = drain("d1", move("a"))
    second = drain("d2", carried := hop(M.MOVED, "n2", "n3"), node="n2")
    home = undrain("u1", hop(M.MOVED, "n3", "n1"))
    assert carried_to(carried, [second, first]) == "n3"
    assert carried_to(carried, [home, second, first]) == ""
    away = drain("d3", hop(M.MOVED, "n1", "n3"))
    assert carried_to(carried, [away, home, second, first]) == "", "that is n1's affair"
    assert carried_to(away.moves[0], [away, home, second, first]) == "n3"


def test_a_drain_that_met_an_undrain_on_its_way_has_moved_nothing_of_its_own() -> None:
    first = drain("d1", move("a"))
    on_its_way = msgspec.structs.replace(hop(M.MOVED, "n2", "n1"), migration="m")
    home = undrain("u1", on_its_way)
    met = msgspec.structs.replace(on_its_way, ended_at_s=9.0)
    second = drain("d2", met, node="n2")
    assert carried_to(met, [second, home, first]) == ""


def test_what_an_undrain_under_way_brings_is_left_to_it() -> None:
    first = drain("d1", first_move := move("a"))
    second = drain("d2", carried := hop(M.MOVED, "n2", "n3"), node="n2")
    home = undrain("u1", hop(M.WAITING, "n3", "n1"), state=S.RUNNING, ended_at_s=None)
    assert in_other_hands(carried, [home, second, first]) == HOME
    back = undrain("u2", hop(M.MOVING, "n3", "n2"), node="n2", state=S.RUNNING, ended_at_s=None)
    told = in_other_hands(first_move, [back, second, first])
    assert told == "undrain u2 brings it to n2 first; then `ferry undrain n1`"
    over = undrain("u2", hop(M.MOVED, "n3", "n2"), node="n2")
    assert in_other_hands(first_move, [over, second, first]) == ""
    assert in_other_hands(move("b"), [back, second, first]) == ""


def hop(state: MoveState, source: str, destination: str) -> Move:
    return Move(domain="a", source=source, destination=destination, state=state)


def test_an_undrain_is_no_less_done_for_what_was_deleted() -> None:
    gone = PlanBlocker(domain="a", reason="it isn't defined any more", remedy="")
    left = PlanBlocker(domain="b", reason="it was moved on to n3 meanwhile", remedy="")
    made = complete(undrain("u1"), [drain("d1")], (gone, left))
    assert [each.state for each in made.moves] == [M.GONE, M.LEFT]
    assert sentence(made.moves[0]) == "a: gone: it isn't defined any more"
    back = drain("d1", move("a"), move("b"), restored_by="u1")
    done = undrain("u1", *made.moves, state=S.PARTIAL)
    assert names([done, back]) == [["b"]], "and no later one asks after it"


class Off:
    """A world in which n1 comes back, and `web`, which the drain powered off, is to start there."""

    def __init__(self, spec: DomainSpec) -> None:
        self._web = Domain(name="web", spec=spec, state=DomainState.STOPPED, node=None)
        self.cluster = self

    async def get_domain(self, name: str) -> Domain:
        return self._web

    async def survey(self, *_: object, **__: object) -> Survey:
        info = heartbeat("n1", memory_bytes=2**32, cpus=2, pools=("default",))
        capabilities = msgspec.structs.replace(
            info.capabilities, machine_types=("pc-q35-7.2",), cpu_models=("host",)
        )
        info = msgspec.structs.replace(info, capabilities=capabilities)
        view = NodeView(info=info, state=NodeState.READY, heartbeat_age_s=0.5)
        return make_survey({"n1": view}, [self._web], {})

    async def plan(self, survey: Survey, names: list[str], options: PlanOptions, **_: bool) -> Plan:
        return plan_moves(survey.nodes, survey.domains, names, options)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, ""),
        ({"disks": (DiskSpec(volume="web", pool="gone"),)}, "pool gone"),
        ({"machine": "pc-q35-9.9"}, "pc-q35-9.9"),
        ({"memory_bytes": 2**40}, "1048576 MiB needed"),
    ],
)
async def test_a_dry_run_names_what_a_powered_off_domain_lacks(
    changes: dict[str, object], reason: str
) -> None:
    """Else its start is tried, in vain, once the node is open."""
    spec = DomainSpec(name="web", memory_bytes=2**28, machine="pc-q35-7.2", cpu_model="host")
    stopped = Move(domain="web", source="n1", destination=None, state=M.STOPPED)
    world = Off(msgspec.structs.replace(spec, **changes))
    _, found, left = await plan(
        world,  # type: ignore[arg-type]
        "n1",
        [drain("d", stopped)],
        0.0,
    )
    if not reason:
        assert ([each.destination for each in found.moves], left) == (["n1"], ())
        return
    assert found.moves == ()
    assert [each.domain for each in left] == ["web"] and reason in left[0].reason
