"""What a dry run tells beside the moves: the nodes that it gave nothing to."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, cast

import msgspec
import pytest

from migrator.model import (
    DomainSpec,
    DomainState,
    MaintenancePolicy,
    Migration,
    MigrationProgress,
    MigrationRequest,
    MigrationState,
    NodeName,
    NodeState,
)
from node_agent.cli.drain_text import balance_text, plan_text
from node_agent.drain import departures
from node_agent.drain.coordinator import _time_of_move
from node_agent.drain.neighbours import promised, under_way
from node_agent.drain.records import DrainRecords
from node_agent.drain.resources import (
    BalancePlan,
    CordonRequest,
    Drain,
    DrainPlan,
    DrainPolicy,
    DrainRequest,
    DrainState,
    Move,
    MoveState,
    NodeLeftOut,
    Operation,
    PlanMove,
    timeout_of,
)
from node_agent.drain.service import DrainService
from node_agent.drain.survey import Survey, make_survey, one_way_moves
from node_agent.nodes import NodeView
from node_agent.planner.model import DomainFacts, Plan, PlanOptions
from node_agent.planner.plan import plan_moves
from node_agent.resources import Domain
from node_agent.state.memory import SimulatedData, SimulatedStore
from node_agent.state.typed import TypedStore
from tests.unit.heartbeats import heartbeat


def view(name: str, state: NodeState, age_s: float = 0.5) -> NodeView:
    info = heartbeat(name, memory_bytes=2**32, cpus=2)
    return NodeView(info=info, state=state, heartbeat_age_s=age_s)


def running(name: str, node: str) -> Domain:
    spec = DomainSpec(name=name, memory_bytes=2**28)
    return Domain(name=name, spec=spec, state=DomainState.RUNNING, node=node)


class Nodes:
    """In the place of the drains' world: n1 is empty, the others are in all sorts of states."""

    trouble = ""

    def __init__(self, leaving: Mapping[str, Migration] | None = None) -> None:
        self._leaving = dict(leaving or {})

    async def leaving(self, _node: str) -> dict[str, Migration]:
        return self._leaving

    async def views(self) -> dict[str, NodeView]:
        return {
            "n1": view("n1", NodeState.READY),
            "n2": view("n2", NodeState.READY),
            "n3": view("n3", NodeState.UNREACHABLE, age_s=34.4),
            "n4": view("n4", NodeState.CORDONED),
        }

    async def owned_by(self, _node: str) -> tuple[str, ...]:
        return ()

    async def survey(
        self,
        _: object,
        *,
        sample_s: float,
        closed: Collection[str],
        places: Mapping[str, str],
    ) -> Survey:
        self.places = places
        domains = [running(name, "n1") for name in places]
        return make_survey(await self.views(), domains, {}, closed=closed, places=places)

    async def plan(self, survey: Survey, leaving: Collection[str], options: PlanOptions) -> Plan:
        return plan_moves(survey.nodes, survey.domains, leaving, options)


LEFT_OUT = (
    NodeLeftOut(node="n3", reason="it is unreachable: no heartbeat for 34 s"),
    NodeLeftOut(node="n4", reason="it is cordoned"),
)


async def service_of(world: Nodes) -> tuple[DrainService, TypedStore]:
    store = SimulatedStore(SimulatedData())
    await store.open()
    rest: Any = None
    typed = TypedStore(store)
    service = DrainService(
        NodeName("n2"), store=typed, world=cast(Any, world), hub=rest, events=rest
    )
    return service, typed


async def test_what_another_drain_has_given_away_is_no_place() -> None:
    """Two drains at once, and room for one: the second one was begun, and failed on its way."""
    service, store = await service_of(world := Nodes())
    moves = (
        Move(domain="a", source="n4", destination="n2"),
        Move(domain="b", source="n4", destination="n2", state=MoveState.SEEKING),
        Move(domain="c", source="n4", destination="n2", state=MoveState.MOVED),
    )
    other = Drain(
        id="d",
        operation=Operation.DRAIN,
        node="n4",
        state=DrainState.RUNNING,
        created_at_s=1.0,
        started_at_s=1.0,
        moves=moves,
    )
    await DrainRecords(store).add(other)
    await service.plan(NodeName("n1"), DrainRequest())
    assert world.places == {"a": "n2"}
    assert promised([other], besides=["a"]) == {}
    assert [each.domain for each in under_way([other], "d")] == []


def migration(domain: str, destination: str) -> Migration:
    return Migration(
        id=f"m-{domain}",
        domain=domain,
        source="n1",
        destination=destination,
        request=MigrationRequest(destination=destination),
        state=MigrationState.PRECOPY,
        progress=MigrationProgress(state=MigrationState.PRECOPY, eta_s=7.4),
        created_at_s=1.0,
    )


async def test_what_is_leaving_already_is_waited_for_and_neither_planned_nor_a_blocker() -> None:
    """No node could take it: the only other one had a copy of it already, its own."""
    service, _ = await service_of(world := Nodes({"web": migration("web", "n2")}))
    plan = await service.plan(NodeName("n1"), DrainRequest())
    assert (plan.moves, plan.blockers) == ((), ())
    assert world.places == {"web": "n2"}, "it counts where it will be"
    assert [(each.domain, each.destination, each.eta_s) for each in plan.leaving] == [
        ("web", "n2", 7.4)
    ]
    told = plan_text(plan)
    assert told.splitlines()[:2] == [
        "These are leaving already, and are waited for:",
        "  web: to n2, by migration m-web, ~7 s left",
    ]
    assert "nothing has to move" not in told
    kept = await service.plan(NodeName("n1"), DrainRequest(exclude=("web",)))
    assert kept.leaving == ()


def test_what_is_leaving_already_is_one_of_the_drains_moves() -> None:
    one = migration("web", "n2")
    survey = make_survey({}, [running("web", "n1")], {}, places={"web": "n2"})
    (move,) = departures.moves([one], survey, DrainPolicy.STOP, 5.0)
    assert (move.state, move.migration, move.already) == (MoveState.MOVING, "m-web", True)
    assert (move.policy, move.live) == (MaintenancePolicy.STOP, True)
    assert (move.planned_s, move.started_at_s) == (7.4, 5.0)


async def test_a_dry_run_names_the_nodes_that_it_left_out() -> None:
    service, _ = await service_of(Nodes())
    plan = await service.plan(NodeName("n1"), DrainRequest())
    assert plan.left_out == LEFT_OUT, "the node itself needn't be named"


def old_and_new() -> dict[str, NodeView]:
    """Two nodes, of which the new one's processor can do more."""
    views = {name: view(name, NodeState.READY) for name in ("old", "new")}
    flags = {"old": ("avx2",), "new": ("avx2", "avx512f")}
    for name, each in views.items():
        capable = msgspec.structs.replace(
            each.info.capabilities,
            machine_types=("q35",),
            cpu_models=("host", "qemu64"),
            cpu_features=flags[name],
        )
        info = msgspec.structs.replace(each.info, capabilities=capable)
        views[name] = msgspec.structs.replace(each, info=info)
    return views


@pytest.mark.parametrize("policy", [MaintenancePolicy.LIVE, MaintenancePolicy.STOP])
def test_a_guest_that_boots_there_may_lose_features_of_its_processor(
    policy: MaintenancePolicy,
) -> None:
    """A whole processor's guest of policy stop was said to have no place on an older one."""
    spec = DomainSpec(
        name="whole", memory_bytes=2**28, cpu_model="host", machine="q35", maintenance=policy
    )
    whole = Domain(name="whole", spec=spec, state=DomainState.RUNNING, node="new")
    survey = make_survey(old_and_new(), [whole], {}, closed=("new",))
    plan = plan_moves(survey.nodes, survey.domains, ("whole",), PlanOptions())
    blocked = [each.reason for each in plan.blockers]
    if policy is MaintenancePolicy.STOP:
        assert [each.destination for each in plan.moves] == ["old"], blocked
    else:
        assert blocked == ["no node can take it: old: it has no feature avx512f"]


async def test_moves_that_no_undrain_can_undo_are_told() -> None:
    """The undrain left the guest, and only then was it said why."""
    views = old_and_new()
    domains = [running(name, "old") for name in ("whole", "model")]
    for index, model in enumerate(("host", "qemu64")):
        spec = msgspec.structs.replace(domains[index].spec, cpu_model=model, machine="q35")
        domains[index] = msgspec.structs.replace(domains[index], spec=spec)
    survey = make_survey(views, domains, {}, closed=("old",))
    plan = plan_moves(survey.nodes, survey.domains, ("whole", "model"), PlanOptions())
    told = tuple(one_way_moves(survey, plan, views))
    assert told == (
        "whole: no way back to old but by stop and start: with CPU model host it gets avx512f on "
        "new, which old lacks",
    )
    assert f"Mind:\n  {told[0]}" in plan_text(DrainPlan(node="old", moves=(), remarks=told))


def test_the_left_out_nodes_are_printed() -> None:
    told = [
        "Left out of the plan, as nothing moves there now:",
        "  n3: it is unreachable: no heartbeat for 34 s",
        "  n4: it is cordoned",
    ]
    assert plan_text(DrainPlan(node="n1", moves=(), left_out=LEFT_OUT)).splitlines()[-3:] == told
    balanced = BalancePlan(moves=(), before={}, after={}, reason="even", left_out=LEFT_OUT)
    assert balance_text(balanced).splitlines()[-3:] == told
    assert "Left out" not in plan_text(DrainPlan(node="n1", moves=()))
    many = tuple(NodeLeftOut(node=f"n{n}", reason="it is drained") for n in range(30))
    assert "  and 10 more (`ferry node ls`)" in plan_text(
        DrainPlan(node="x", moves=(), left_out=many)
    )


async def test_a_long_plan_is_cut_off_by_nothing_that_nobody_chose() -> None:
    """20 guests of 60 GB: ten minutes each, in more than three hours."""
    assert timeout_of(12_000.0) == 24_000.0
    assert timeout_of(20.0) == 3600.0
    assert timeout_of(12_000.0, 60.0) == 60.0
    assert _time_of_move(650.0, left_s=3000.0) == 1950.0
    assert _time_of_move(5.0, left_s=3000.0) == 600.0
    assert _time_of_move(5.0, left_s=-5.0) == 30.0, "it began in time, and is let converge"
    service, _ = await service_of(Nodes())
    assert (await service.plan(NodeName("n1"), DrainRequest(timeout_s=5.0))).timeout_s == 5.0


def test_what_a_timeout_would_leave_is_told_beforehand() -> None:
    moves = tuple(
        PlanMove(
            domain=f"g{number}",
            source="n1",
            destination="n2",
            policy=MaintenancePolicy.LIVE,
            wire_bytes=1,
            bandwidth_bytes_per_s=1.0,
            start_s=number * 10.0,
            seconds=10.0,
        )
        for number in range(3)
    )
    plan = DrainPlan(node="n1", moves=moves, planned_s=30.0, timeout_s=5.0)
    assert "after --timeout 5 s no move begins any more; by this plan g1, g2" in plan_text(plan)
    assert "--timeout" not in plan_text(msgspec.structs.replace(plan, timeout_s=3600.0))


def test_a_domain_that_is_just_switching_over_blocks_no_drain() -> None:
    """The drain waits for that migration; it was refused in those milliseconds."""
    found = {
        name: _facts(name, state, migration)
        for name, state, migration in (
            ("moves", DomainState.PRE_SWITCHOVER, "m1"),
            ("stuck", DomainState.POSTMIGRATE, None),
            ("rests", DomainState.PAUSED, None),
        )
    }
    assert found["moves"].obstacle == ""
    assert found["stuck"].obstacle.startswith("it is postmigrate")
    assert found["rests"].cure == "resume it (`ferry domain resume rests`)"


def _facts(name: str, state: DomainState, migration: str | None) -> DomainFacts:
    spec = DomainSpec(name=name, memory_bytes=2**28)
    domain = Domain(name=name, spec=spec, state=state, node="n1", migration=migration)
    (facts,) = make_survey({"n1": view("n1", NodeState.READY)}, (domain,), {}).domains
    return facts


def test_an_older_agent_is_asked_for_nothing_that_nobody_wants() -> None:
    assert msgspec.json.encode(DrainRequest()) == b"{}"
    assert msgspec.json.encode(CordonRequest()) == b"{}"
    assert b"firmware" in msgspec.json.encode(DrainRequest(reason="firmware"))
