"""Drains of real guests: planned, carried out, cancelled, undone, and taken over from a dead agent.

The lab's three nodes are shared with all tests of clusters: whatever happens, the nodes are open
again at the end.
"""

from __future__ import annotations

import contextlib
import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from deploy import lab
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
from node_agent.resources import Domain, Node, StartRequest
from tests.integration.cluster.drains import END_S, ended, node, open_all, seen, told
from tests.integration.cluster.reboots import after_reboot
from tests.integration.cluster.world import (
    Cluster,
    Guest,
    Load,
    alone_at,
    describe,
    eventually,
)

pytestmark = [pytest.mark.lab, pytest.mark.timeout(300)]

GUESTS = 3
LOAD = Load(dirty_pages_per_s=200, memory_mib=16, udp=False)
COMMAND_S = 120.0


@pytest.fixture(scope="module")
def guests(cluster: Cluster) -> Iterator[list[Guest]]:
    """On n1, and nothing else anywhere."""
    with contextlib.ExitStack() as stack:
        stack.callback(open_all, cluster)
        yield [stack.enter_context(cluster.guest(f"evac{n}", load=LOAD)) for n in range(GUESTS)]


@pytest.fixture
def home(cluster: Cluster, guests: list[Guest]) -> list[Guest]:
    """The guests, all on n1, and every node open."""
    open_all(cluster)
    for guest in guests:
        if guest.node != "n1":
            cluster.move(guest.name, "n1")
    return guests


def drain(cluster: Cluster, via: str = "n1", **request: object) -> Drain:
    body = DrainRequest(**request)  # type: ignore[arg-type]
    return cluster.api(via).post("/v1/nodes/n1/drain", Drain, body)


def becomes(cluster: Cluster, state: NodeState) -> None:
    """n1 is in it, a moment after its drain's record says so."""
    eventually(f"n1 is {state}", lambda: node(cluster, "n1").state is state)


def ferry(cluster: Cluster, *arguments: str) -> subprocess.CompletedProcess[str]:
    api = f"unix:{cluster.plan.node('n2').api_socket}"
    return subprocess.run(
        [sys.executable, "-m", "node_agent.cli.main", "--api", api, *arguments],
        capture_output=True,
        text=True,
        timeout=COMMAND_S,
        check=False,
    )


def test_balancing_moves_what_is_too_much_and_then_lets_it_rest(
    cluster: Cluster, guests: list[Guest]
) -> None:
    """First of all, for a domain that has moved in the last ten minutes stays."""
    assert {guest.node for guest in guests} == {"n1"}
    shown = ferry(cluster, "balance")
    assert shown.returncode == ExitCode.OK, shown.stderr
    assert "DIFFERENCE OF" in shown.stdout and "n1 -> n" in shown.stdout
    assert {guest.node for guest in guests} == {"n1"}, "without --apply it only tells"
    run = ferry(cluster, "balance", "--apply", "--json")
    assert run.returncode == ExitCode.OK, run.stderr
    done = json.loads(run.stdout)
    assert (done["operation"], done["state"]) == ("balance", "done")
    away = [guest for guest in guests if guest.node != "n1"]
    assert {guest.name for guest in away} == {move["domain"] for move in done["moves"]}
    assert 1 <= len(away) < GUESTS
    for guest in guests:
        guest.verify()
    again = json.loads(ferry(cluster, "balance", "--json").stdout)
    assert {move["domain"] for move in again["moves"]}.isdisjoint(guest.name for guest in away)


def on_terminal(
    arguments: list[str],
    until: Callable[[str], bool] = lambda _: False,
    then: bytes = b"",
) -> tuple[int, str]:
    """Run `ferry` on a terminal of its own; when `until` holds of what it printed, type `then`."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ |= {"TERM": "xterm", "COLUMNS": "110", "LINES": "30"}
        os.execv(sys.executable, [sys.executable, "-m", "node_agent.cli.main", *arguments])
    text, typed = "", False
    deadline = time.monotonic() + COMMAND_S
    try:
        while time.monotonic() < deadline:
            if select.select([terminal], [], [], 0.2)[0]:
                try:
                    data = os.read(terminal, 65_536)
                except OSError:  # EIO: it has ended.
                    data = b""
                if not data:
                    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), text
                text += data.decode(errors="replace")
            if not typed and until(text):
                typed = True
                os.write(terminal, then)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        raise AssertionError(f"it doesn't end; it printed:\n{text}")
    finally:
        os.close(terminal)


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
    becomes(cluster, NodeState.DRAINED)
    assert cluster.processes("n1")  # Its agent,
    for guest in home:  # and no guest: what is left of one that has gone ends by itself.
        assert guest.node != "n1"
        alone_at(guest, guest.node)
        guest.verify()
    with pytest.raises(ApiProblem, match="n1 is drained"):
        cluster.migrate(home[0].name, "n1")

    again = ferry(cluster, "drain", "n1")
    assert again.returncode == ExitCode.OK, again.stderr
    assert "0 of 0 domains" in again.stdout  # And where they belong isn't forgotten:
    back = ferry(cluster, "undrain", "n1")
    assert back.returncode == ExitCode.OK, back.stdout + back.stderr
    assert "its domains are back" in back.stdout
    becomes(cluster, NodeState.READY)
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
    assert "n2, n3: it is cordoned by " in reasons[0]
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


def test_what_is_leaving_already_is_waited_for(cluster: Cluster, home: list[Guest]) -> None:
    """The only node that could take it has its copy: said to be refused there, it was a blocker."""
    first, api = home[0].name, cluster.api()
    api.post("/v1/nodes/n3/cordon", Node)
    with cluster.held("destination", "Prepared") as point:
        own = cluster.migrate(first, "n2")
        point.wait_reached()
        plan = api.post("/v1/nodes/n1/drain?dry_run=true", DrainPlan, DrainRequest())
        assert plan.blockers == ()
        assert [(each.domain, each.migration) for each in plan.leaving] == [(first, own.id)]
        assert {move.domain for move in plan.moves} == {guest.name for guest in home[1:]}
        begun = drain(cluster)
        eventually(
            "it is said to be waited for",
            lambda: f"{first}, on its way to n2 already" in seen(cluster, begun.id).waits_for,
        )
    over = ended(cluster, begun.id)
    assert over.state is DrainState.DONE, told(over)
    states = {move.domain: move.state for move in over.moves}
    assert states.pop(first) is MoveState.GONE
    assert set(states.values()) == {MoveState.MOVED}
    api.post("/v1/nodes/n3/uncordon", Node)
    back = ended(cluster, api.post("/v1/nodes/n1/undrain", Drain).id)
    assert back.state is DrainState.DONE, told(back)
    assert [guest.node for guest in home] == ["n2", *["n1"] * (GUESTS - 1)]


def test_a_cancelled_drain_opens_the_node(cluster: Cluster, home: list[Guest]) -> None:
    """A move is held where it may wait long (30 s): so one is under way, and others wait."""
    with cluster.held("destination", "Prepared") as point:
        begun = drain(cluster, via="n3", parallel=1)
        point.wait_reached()
        asked = ferry(cluster, "drain", "n1", "--cancel", "--no-wait")
        assert asked.returncode == ExitCode.OK, asked.stderr
        assert f"drain {begun.id} of node n1 is being cancelled" in asked.stdout
        eventually(
            "the drain is being cancelled",
            lambda: seen(cluster, begun.id).state is DrainState.CANCELLING,
        )
    over = ended(cluster, begun.id)
    assert over.state is DrainState.CANCELLED, told(over)
    states = sorted(move.state for move in over.moves)
    assert states == [MoveState.LEFT] * (GUESTS - 1) + [MoveState.MOVED], told(over)
    becomes(cluster, NodeState.READY)
    assert len([guest for guest in home if guest.node == "n1"]) == GUESTS - 1
    # What has left comes home all the same.
    begun = cluster.api().post("/v1/nodes/n1/undrain", Drain)
    back = ended(cluster, begun.id)
    assert back.state is DrainState.DONE, told(back)
    assert {guest.node for guest in home} == {"n1"}


def test_ctrl_c_detaches_and_the_live_view_shows_each_move(
    cluster: Cluster, home: list[Guest]
) -> None:
    """On a terminal, as a user sees it."""
    with cluster.held("destination", "Prepared") as point:
        status, seen_text = on_terminal(
            ["--api", f"unix:{cluster.plan.node('n2').api_socket}", "drain", "n1"],
            until=lambda text: "moving" in text and "1 s gone" in text,
            then=b"\x03",
        )
        assert status == ExitCode.INTERRUPTED, seen_text
        assert f"{home[0].name}  " in seen_text and "plan: " in seen_text
        assert "goes on; `ferry drains watch" in seen_text
        point.wait_reached()
        (begun,) = [
            each for each in cluster.api().get("/v1/drains", DrainList).drains if not each.ended
        ]
        assert begun.state is DrainState.RUNNING, "the drain didn't end with its watcher"
    status, seen_text = on_terminal(
        ["--api", f"unix:{cluster.plan.node('n2').api_socket}", "drains", "watch", begun.id]
    )
    assert status == ExitCode.OK, seen_text
    assert "node n1 is empty" in seen_text
    assert all(guest.node != "n1" for guest in home)


def test_after_its_reboot_a_node_gets_its_domains_back_by_itself(
    cluster: Cluster, home: list[Guest], tmp_path: Path
) -> None:
    """Its next agent sees another boot id, as after a reboot."""
    run = ferry(cluster, "drain", "n1", "--reboot-hint", "--json")
    assert run.returncode == ExitCode.OK, run.stderr
    becomes(cluster, NodeState.DRAINED)
    lab.restart_agent(cluster.name, "n1")
    assert node(cluster, "n1", via="n2").state is NodeState.DRAINED, "a restart is no reboot"
    with after_reboot(cluster, "n1", tmp_path):
        names = [guest.name for guest in home]
        eventually(
            "its domains are back",
            lambda: {cluster.domain(name, "n2").node for name in names} == {"n1"},
            END_S,
        )
        eventually("n1 is open", lambda: node(cluster, "n1", "n2").state is NodeState.READY)
    for guest in home:
        guest.verify()


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
            lambda guest=guest: guest.copies() == [cluster.domain(guest.name).node],  # type: ignore[misc]
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
        open_all(cluster)
