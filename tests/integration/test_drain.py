"""Drains of real guests: planned, carried out, cancelled, undone, and taken over from a dead agent.

The lab's three nodes are shared with all tests of clusters: whatever happens, the nodes are open
again at the end.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator

import msgspec
import pytest

from deploy.guest.protocol import READY
from migrator.model import DomainState, MaintenancePolicy, MigrationState, NodeState
from node_agent.cli.errors import ApiProblem, ExitCode
from node_agent.drain.resources import (
    Drain,
    DrainList,
    DrainPlan,
    DrainRequest,
    DrainState,
    MoveState,
    UndrainRequest,
)
from node_agent.resources import Domain, Node, NodeList, StartRequest
from tests.integration.cluster.world import Cluster, Guest, Load, describe, eventually

pytestmark = [pytest.mark.lab, pytest.mark.timeout(300)]

GUESTS = 3
LOAD = Load(dirty_pages_per_s=200, memory_mib=16, udp=False)
END_S = 120.0
COMMAND_S = 120.0


@pytest.fixture(scope="module")
def guests(cluster: Cluster) -> Iterator[list[Guest]]:
    """On n1, and nothing else anywhere."""
    with contextlib.ExitStack() as stack:
        stack.callback(_open_all, cluster)
        yield [stack.enter_context(cluster.guest(f"evac{n}", load=LOAD)) for n in range(GUESTS)]


def _open_all(cluster: Cluster) -> None:
    """Whatever a failed test has left: no drain, no cordon."""
    api = cluster.api()
    for drain in api.get("/v1/drains", DrainList).drains:
        if not drain.ended:
            with contextlib.suppress(ApiProblem):
                api.delete(f"/v1/drains/{drain.id}?abort_moves=true")
            ended(cluster, drain.id)
    for node in api.get("/v1/nodes", NodeList).nodes:
        if node.state in (NodeState.CORDONED, NodeState.DRAINED):
            api.post(f"/v1/nodes/{node.name}/uncordon", Node)


@pytest.fixture
def home(cluster: Cluster, guests: list[Guest]) -> list[Guest]:
    """The guests, all on n1, and every node open."""
    _open_all(cluster)
    for guest in guests:
        if guest.node != "n1":
            cluster.move(guest.name, "n1")
    return guests


def node(cluster: Cluster, name: str, via: str = "n1") -> Node:
    found = cluster.api(via).get("/v1/nodes", NodeList).nodes
    return next(each for each in found if each.name == name)


def drain(cluster: Cluster, via: str = "n1", **request: object) -> Drain:
    body = DrainRequest(**request)  # type: ignore[arg-type]
    return cluster.api(via).post("/v1/nodes/n1/drain", Drain, body)


def seen(cluster: Cluster, id: str, via: str = "n1") -> Drain:
    return cluster.api(via).get(f"/v1/drains/{id}", Drain)


def ended(cluster: Cluster, id: str, via: str = "n1") -> Drain:
    def find() -> Drain | None:
        found = seen(cluster, id, via)
        return found if found.ended else None

    return eventually(f"drain {id} ends", find, END_S)


def told(drain: Drain) -> str:
    """For an assertion's message."""
    moves = "; ".join(f"{move.domain} {move.state}: {move.error}" for move in drain.moves)
    notes = "\n".join(note.text for note in drain.history)
    return f"{drain.state} {drain.error}: {moves}\n{notes}"


def ferry(cluster: Cluster, *arguments: str) -> subprocess.CompletedProcess[str]:
    api = f"unix:{cluster.plan.node('n2').api_socket}"
    return subprocess.run(
        [sys.executable, "-m", "node_agent.cli.main", "--api", api, *arguments],
        capture_output=True,
        text=True,
        timeout=COMMAND_S,
        check=False,
    )


def test_a_node_is_emptied_and_its_guests_come_home(cluster: Cluster, home: list[Guest]) -> None:
    names = {guest.name for guest in home}
    dry = ferry(cluster, "drain", "n1", "--dry-run", "--json")
    assert dry.returncode == ExitCode.OK, dry.stderr
    plan = json.loads(dry.stdout)
    assert {move["domain"] for move in plan["moves"]} == names
    assert plan["planned_s"] >= plan["lower_bound_s"] > 0
    assert node(cluster, "n1").state is NodeState.READY

    run = ferry(cluster, "drain", "n1", "--json")
    assert run.returncode == ExitCode.OK, run.stderr
    done = json.loads(run.stdout)
    assert done["state"] == "done"
    assert all(move["blackout_ms"] > 0 for move in done["moves"])
    assert node(cluster, "n1").state is NodeState.DRAINED
    assert cluster.processes("n1")  # Its agent,
    for guest in home:  # and no guest.
        assert cluster.qemus("n1", guest.name) == []
        assert guest.copies() == [guest.node]
        guest.verify()
    with pytest.raises(ApiProblem, match="n1 is drained"):
        cluster.migrate(home[0].name, "n1")

    back = ferry(cluster, "undrain", "n1")
    assert back.returncode == ExitCode.OK, back.stdout + back.stderr
    assert "its domains are back" in back.stdout
    assert node(cluster, "n1").state is NodeState.READY
    assert {guest.node for guest in home} == {"n1"}
    print(run.stderr, back.stdout)


def test_what_can_t_leave_is_named_and_nothing_moves(cluster: Cluster, home: list[Guest]) -> None:
    first = home[0].name
    api = cluster.api()
    api.post("/v1/nodes/n2/cordon", Node)
    api.post("/v1/nodes/n3/cordon", Node)
    with pytest.raises(ApiProblem) as refused:
        drain(cluster)
    reasons = refused.value.problem.reasons
    assert len(reasons) == GUESTS
    assert "n2: it is cordoned; n3: it is cordoned" in reasons[0]
    assert "open n2, n3" in reasons[0]
    assert node(cluster, "n1").state is NodeState.READY
    with pytest.raises(ApiProblem, match="nothing may come there"):
        cluster.migrate(first, "n2")
    api.post("/v1/nodes/n2/uncordon", Node)
    plan = api.post("/v1/nodes/n1/drain?dry_run=true", DrainPlan, DrainRequest(exclude=(first,)))
    assert {move.destination for move in plan.moves} == {"n2"}
    with pytest.raises(ApiProblem, match="no domain nobody runs on node n1"):
        drain(cluster, exclude=("nobody",))
    with pytest.raises(ApiProblem, match="there is no node n9"):
        api.post("/v1/nodes/n9/drain", Drain)


def test_a_cancelled_drain_opens_the_node(cluster: Cluster, home: list[Guest]) -> None:
    """The source is held in the first move: so there is a move under way, and others wait."""
    with cluster.held("source", "ContinueSwitchover") as point:
        begun = drain(cluster, via="n3", parallel=1)
        point.wait_reached()
        asked = cluster.api("n2").delete("/v1/nodes/n1/drain")
        assert b"let-end" in asked
        eventually(
            "the drain is being cancelled",
            lambda: seen(cluster, begun.id).state is DrainState.CANCELLING,
        )
    over = ended(cluster, begun.id)
    assert over.state is DrainState.CANCELLED, told(over)
    states = sorted(move.state for move in over.moves)
    assert states == [MoveState.LEFT] * (GUESTS - 1) + [MoveState.MOVED], told(over)
    eventually("n1 is open", lambda: node(cluster, "n1").state is NodeState.READY)
    assert len([guest for guest in home if guest.node == "n1"]) == GUESTS - 1
    # What has left comes home all the same.
    begun = cluster.api().post("/v1/nodes/n1/undrain", Drain)
    back = ended(cluster, begun.id)
    assert back.state is DrainState.DONE, told(back)
    assert {guest.node for guest in home} == {"n1"}


def test_another_agent_goes_on_and_a_dead_destination_is_given_up(
    cluster: Cluster, home: list[Guest]
) -> None:
    """The agent that coordinates is killed, and with it the engine of the first destination."""
    with cluster.held("destination", "Prepared") as point:
        begun = drain(cluster, via="n3", parallel=1)
        point.wait_reached()
        first = next(move for move in seen(cluster, begun.id, "n3").moves if move.state.active)
        victim = first.destination
        assert victim is not None
        cluster.kill(cluster.agent("n3"))
        if victim != "n3":
            cluster.kill(cluster.agent(victim))
    over = ended(cluster, begun.id)
    assert over.coordinator != "n3"
    cluster.restart_missing_agents()
    left = [move for move in over.moves if move.state is not MoveState.MOVED]
    assert over.state is DrainState.DONE or left, told(over)
    for guest in home:
        moved = [
            each
            for each in cluster.migrations_of(guest.name)
            if each.created_at_s >= begun.created_at_s and each.state is MigrationState.COMPLETED
        ]
        assert len(moved) <= 1, [describe(each) for each in moved]
        eventually(
            f"one copy of {guest.name}",
            lambda guest=guest: guest.copies() == [guest.node],  # type: ignore[misc]
        )
    if over.state is DrainState.DONE:
        assert all(guest.node != "n1" for guest in home)


def test_a_domain_that_is_to_be_stopped_starts_elsewhere(
    cluster: Cluster, home: list[Guest]
) -> None:
    """And stays there: to bring it home would cost it another stop."""
    guest = Guest(cluster, "stopper", 99, LOAD)
    spec = msgspec.structs.replace(guest.spec, maintenance=MaintenancePolicy.STOP)
    api = cluster.api()
    api.post("/v1/domains", Domain, spec)
    try:
        api.post("/v1/domains/stopper/start", Domain, StartRequest(node="n2"))
        eventually("stopper is ready", lambda: READY in guest.console(), END_S)
        begun = api.post("/v1/nodes/n2/drain", Drain, DrainRequest())
        over = ended(cluster, begun.id)
        assert over.state is DrainState.DONE, told(over)
        domain = cluster.domain("stopper")
        assert domain.state is DomainState.RUNNING
        assert domain.node != "n2"
        assert cluster.migrations_of("stopper") == []
        back = api.post("/v1/nodes/n2/undrain", Drain, UndrainRequest())
        left = ended(cluster, back.id).moves
        assert "powered off again" in str(left[0].error)
    finally:
        guest.remove()
        _open_all(cluster)
