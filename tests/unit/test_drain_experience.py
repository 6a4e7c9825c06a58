"""What a drain's plan learns from the outcome of earlier ones."""

from __future__ import annotations

import msgspec
import pytest

from migrator.model import MaintenancePolicy
from node_agent.drain.experience import KNOWN_FOR_S, overhead_s, stop_s
from node_agent.drain.resources import Drain, DrainState, Move, MoveState, Operation
from node_agent.drain.survey import Survey
from node_agent.planner.model import DomainFacts, NodeFacts, Plan
from node_agent.planner.plan import plan_moves

NOW_S = 1_000_000.0


def move(name: str, took_s: float, **changes: object) -> Move:
    """Planned for 2 s."""
    values: dict[str, object] = {
        "source": "n1",
        "destination": "n2",
        "state": MoveState.MOVED,
        "planned_s": 2.0,
        "attempts": 1,
        "started_at_s": NOW_S - 100.0,
        "ended_at_s": NOW_S - 100.0 + took_s,
    }
    return Move(domain=name, **(values | changes))  # type: ignore[arg-type]


def drain(*moves: Move, **changes: object) -> Drain:
    values: dict[str, object] = {
        "id": "d",
        "operation": Operation.DRAIN,
        "node": "n1",
        "state": DrainState.DONE,
        "created_at_s": NOW_S - 100.0,
        "started_at_s": NOW_S - 100.0,
        "ended_at_s": NOW_S - 50.0,
        "overhead_s": 0.4,
        "moves": moves,
    }
    return Drain(**(values | changes))  # type: ignore[arg-type]


def test_the_median_of_how_late_its_moves_were_is_added() -> None:
    found = overhead_s([drain(move("a", 2.3), move("b", 2.5), move("c", 9.0))], NOW_S)
    assert found == pytest.approx(0.9)
    assert overhead_s([drain(move("a", 1.0), move("b", 1.0))], NOW_S) == 0.0


@pytest.mark.parametrize(
    "silent",
    [
        drain(move("a", 9.0)),
        drain(move("a", 9.0), move("b", 9.0), overhead_s=0.0),
        drain(move("a", 9.0), move("b", 9.0), ended_at_s=None),
        drain(move("a", 9.0), move("b", 9.0), ended_at_s=NOW_S - KNOWN_FOR_S - 1.0),
        drain(move("a", 9.0, attempts=2), move("b", 9.0, state=MoveState.LEFT)),
    ],
    ids=["too few", "of an older agent", "under way", "too old", "not as planned"],
)
def test_what_tells_nothing_is_passed_over(silent: Drain) -> None:
    assert overhead_s([silent], NOW_S) is None
    assert overhead_s([silent, drain(move("a", 2.5), move("b", 2.5))], NOW_S) == 0.9


def test_a_plan_takes_it_within_bounds() -> None:
    survey = Survey(nodes=(), domains=(), links={}, link="", overhead_s=0.3)
    untold = survey.experienced(None).overhead_s
    assert untold is not None
    assert 0.3 < untold < 1.0, "a lone migration's, and what a drain adds"
    nothing = msgspec.structs.replace(survey, overhead_s=None)
    assert nothing.experienced(None) == nothing

    def assumed(overhead: float) -> float:
        options = survey.experienced(overhead).options()
        return options.setup_s + options.finish_s

    assert assumed(0.9) == pytest.approx(0.9)
    assert assumed(60.0) == pytest.approx(1.5)
    assert assumed(0.0) == pytest.approx(0.2)
    assert msgspec.structs.replace(survey, overhead_s=0.9) == survey.experienced(0.9)


def test_busy_nodes_lengthen_a_plan_and_not_its_parallelism() -> None:
    survey = Survey(nodes=(), domains=(), links={}, link="", overhead_s=0.3)
    nodes = [NodeFacts(name=f"n{number}", memory_bytes=1 << 40, cpus=8) for number in (1, 2)]
    domains = [
        DomainFacts(name=f"d{number}", node="n1", memory_bytes=1 << 30, content_bytes=1 << 27)
        for number in range(8)
    ]

    def planned(overhead: float) -> Plan:
        options = survey.experienced(overhead).options()
        return plan_moves(nodes, domains, [each.name for each in domains], options)

    usual, late = planned(1.5), planned(4.5)
    assert late.parallel == usual.parallel
    rounds = len(domains) / late.parallel
    assert late.makespan_s == pytest.approx(usual.makespan_s + 3.0 * rounds, rel=0.2)
    assert late.lower_bound_s <= late.makespan_s
    assert planned(600.0).makespan_s < 40.0 * rounds


def test_what_a_stop_takes_is_learned_from_the_last_operation_of_its_kind() -> None:
    """20 s are assumed; a guest that powers off at once was started elsewhere in one."""
    stop = MaintenancePolicy.STOP
    told = drain(move("a", 0.8, policy=stop), move("b", 1.2, policy=stop), move("c", 60.0))
    assert stop_s([told], Operation.DRAIN, NOW_S) == pytest.approx(1.0)
    assert stop_s([told], Operation.UNDRAIN, NOW_S) is None, "there it is only started"
    unclear = [
        drain(move("a", 9.0, policy=stop, attempts=2)),
        drain(move("a", 9.0, policy=stop, state=MoveState.FAILED)),
        drain(move("a", 9.0, policy=stop), ended_at_s=NOW_S - KNOWN_FOR_S - 1.0),
    ]
    assert stop_s(unclear, Operation.DRAIN, NOW_S) is None
    survey = Survey(nodes=(), domains=(), links={}, link="")
    assert survey.experienced(None, 1.0).options().stop_s == 1.0
    assert survey.experienced(None, 0.01).options().stop_s == 0.5
    assert survey.experienced(None).options().stop_s == 20.0
