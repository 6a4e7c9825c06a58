"""A lab whose state is in a real etcd of three members, which die while guests run and move."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy import lab
from deploy.guest.build import build_guest, default_cache_directory
from deploy.lab.kinds import StoreKind
from deploy.lab.lab import etcd_member
from deploy.lab.plan import ETCD_CLIENT_PORT, ETCD_PEER_PORT, EtcdMemberPlan
from migrator.model import DomainState, MigrationState, NodeState
from node_agent.cli.errors import ApiProblem
from node_agent.drain.resources import Drain, DrainState, MoveState
from node_agent.events import ClusterEvent, EventKind
from node_agent.resources import Domain, Node, NodeList, StartRequest
from tests.integration.cluster.world import (
    UNHEARD_UDP_PER_S,
    Cluster,
    Guest,
    Load,
    alone_at,
    eventually,
)

pytestmark = [pytest.mark.lab, pytest.mark.timeout(240)]

MEMBERS = ("etcd1", "etcd2", "etcd3")
COMMAND_S = 60.0


@pytest.fixture(scope="module")
def etcd_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    name = f"e{os.getpid()}"
    try:
        lab.up(name, nodes=3, node_memory_bytes=1024**3, store=StoreKind.ETCD)
        image = build_guest(default_cache_directory())
        yield Cluster(lab.load(name).plan, image, tmp_path_factory.mktemp("holds"))
    finally:
        lab.down(name)


@pytest.fixture(scope="module")
def guest(etcd_cluster: Cluster) -> Iterator[Guest]:
    load = Load(dirty_pages_per_s=500, udp_per_s=UNHEARD_UDP_PER_S)
    with etcd_cluster.guest("web", load=load) as guest:
        yield guest


@pytest.fixture
def members(etcd_cluster: Cluster) -> Iterator[None]:
    """All members run before and after. Elections in a row may have silenced a node for 5 s."""
    yield
    for member in MEMBERS:
        etcd_member(etcd_cluster.name, member, run=True)
    eventually("the agents have a store again", lambda: _answers(etcd_cluster))
    eventually("all nodes are seen again", lambda: _all_ready(etcd_cluster))


def _answers(cluster: Cluster) -> bool:
    try:
        cluster.migrations_of("web")
    except ApiProblem:
        return False
    return True


@pytest.mark.parametrize("member", MEMBERS)
def test_any_one_member_may_die_in_a_migration(
    etcd_cluster: Cluster, guest: Guest, members: None, member: str
) -> None:
    # Which takes seconds: the member dies in its midst.
    moving = etcd_cluster.migrate("web", guest.other_node(), bandwidth_bytes_per_s=10_000_000)
    etcd_cluster.in_state(moving.id, MigrationState.PRECOPY)
    assert etcd_member(etcd_cluster.name, member, run=False)
    ended = etcd_cluster.ended(moving.id)
    assert ended.state is MigrationState.COMPLETED, ended
    alone_at(guest, ended.destination)
    guest.verify()


def test_a_drain_goes_on_without_the_agent_that_coordinated_it(
    etcd_cluster: Cluster, guest: Guest, members: None
) -> None:
    source = guest.node
    lab.up(etcd_cluster.name, link_mbit=60)
    try:
        begun = etcd_cluster.api("n3").post(f"/v1/nodes/{source}/drain", Drain)
        path = f"/v1/drains/{begun.id}"
        eventually(
            "it moves",
            lambda: etcd_cluster.api().get(path, Drain).moves[0].state is MoveState.MOVING,
        )
        etcd_cluster.kill(etcd_cluster.agent("n3"))
        eventually(
            "another agent brings it to its end",
            lambda: etcd_cluster.api().get(path, Drain).ended,
            timeout_s=60.0,
        )
    finally:
        lab.up(etcd_cluster.name, link_mbit=0)
    over = etcd_cluster.api().get(path, Drain)
    assert over.coordinator != "n3" and over.term == 2, over
    if over.moves[0].destination != "n3":
        assert over.state is DrainState.DONE, over
        assert (over.moves[0].attempts, guest.node) == (1, over.moves[0].destination)
    guest.verify()
    etcd_cluster.api().post(f"/v1/nodes/{source}/uncordon", Node)


def test_without_a_majority_guests_go_on_and_agents_say_why(
    etcd_cluster: Cluster, guest: Guest, members: None
) -> None:
    home, other = guest.node, guest.other_node()
    before = guest.status()
    for member in MEMBERS[:2]:
        etcd_member(etcd_cluster.name, member, run=False)
    with pytest.raises(ApiProblem, match="etcd"):
        etcd_cluster.migrate("web", other)
    with pytest.raises(ApiProblem, match=r"no leader|failed to connect|refused|no answer"):
        etcd_cluster.migrate("web", other, via="n3")
    eventually("one copy is left", lambda: guest.copies() == [home])
    eventually(
        "the guest works all the same",
        lambda: guest.status().memory_checks > before.memory_checks,
    )
    for member in MEMBERS[:2]:
        etcd_member(etcd_cluster.name, member, run=True)
    eventually("the agents have a store again", lambda: _answers(etcd_cluster))
    eventually("all nodes are seen again", lambda: _all_ready(etcd_cluster))
    etcd_cluster.move("web", other)
    guest.verify()


def test_guests_outlive_a_store_that_is_restored_from_a_snapshot(
    etcd_cluster: Cluster, guest: Guest, tmp_path: Path
) -> None:
    """By the commands of docs/cluster.md, "etcd from a backup": `web` has moved since the snapshot,
    and `late` was defined."""
    snapshot, member = tmp_path / "ferry-etcd.db", etcd_cluster.plan.etcd_members[0]
    etcdctl(
        etcd_cluster,
        member,
        *("--endpoints", f"{member.address}:{ETCD_CLIENT_PORT}", "snapshot", "save", str(snapshot)),
    )
    here = guest.other_node()
    etcd_cluster.move("web", here)
    with etcd_cluster.guest("late", "n3", Load(disk=True, udp=False)) as late:
        pids = {each: etcd_cluster.domain(each).pid for each in ("web", "late")}
        restore(etcd_cluster, snapshot)
        assert (guest.copies(), late.copies()) == ([here], ["n3"])
        told = eventually("both are told of", lambda: told_behind(etcd_cluster, 2))
        assert {event.domain: event.node for event in told} == {"web": here, "late": "n3"}
        record = etcd_cluster.plan.node("n3").state_path / "qemu/run/late/state.json"
        define = ["domain", "define", "-f", "-"]
        ferry(etcd_cluster, *define, given=json.dumps(json.loads(record.read_text())["spec"]))
        with pytest.raises(ApiProblem, match="n3 has it"):
            start = StartRequest(node="n1")
            etcd_cluster.api().post("/v1/domains/late/start", Domain, start)
        for name, node in (("web", here), ("late", "n3")):
            ferry(etcd_cluster, "domain", "takeover", name, "--to", node)
            domain = etcd_cluster.domain(name)
            assert (domain.state, domain.node) == (DomainState.RUNNING, node)
            assert domain.pid == pids[name]
        etcd_cluster.move("web", other(here))
        etcd_cluster.move("late", "n1")
        alone_at(guest, other(here))
        alone_at(late, "n1")
        for each in (guest, late):
            each.verify()


def etcdctl(cluster: Cluster, member: EtcdMemberPlan, *arguments: str) -> None:
    run = lab.run_in(cluster.name, member.name, ["etcdctl", *arguments], COMMAND_S)
    assert run.returncode == 0, run.stderr


def restore(cluster: Cluster, snapshot: Path) -> None:
    """With the agents stopped, on every member; returns when all agents are ready again."""
    plan = cluster.plan
    for node in plan.nodes:
        lab.stop_agent(cluster.name, node.name)
    peers = {each: f"http://{each.address}:{ETCD_PEER_PORT}" for each in plan.etcd_members}
    for member, peer in peers.items():
        etcd_member(cluster.name, member.name, run=False)
        data = member.folder / "data"
        data.rename(member.folder / "before")
        etcdctl(
            cluster,
            member,
            *("snapshot", "restore", str(snapshot), "--data-dir", str(data)),
            *("--name", member.name, "--initial-advertise-peer-urls", peer),
            *("--initial-cluster", ",".join(f"{each.name}={at}" for each, at in peers.items())),
        )
    lab.up(cluster.name)


def told_behind(cluster: Cluster, count: int) -> list[ClusterEvent]:
    """The `store-behind` events, once there are so many."""
    found = [each for each in cluster.events() if each.kind == EventKind.STORE_BEHIND]
    return found if len(found) >= count else []


def other(node: str) -> str:
    return "n2" if node == "n1" else "n1"


def ferry(cluster: Cluster, *arguments: str, given: str = "") -> None:
    api = f"unix:{cluster.plan.node('n1').api_socket}"
    command = [sys.executable, "-m", "node_agent.cli.main", "--api", api, *arguments]
    run = subprocess.run(
        command, input=given, capture_output=True, text=True, timeout=COMMAND_S, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr


def _all_ready(cluster: Cluster) -> bool:
    try:
        nodes = cluster.api().get("/v1/nodes", NodeList).nodes
    except ApiProblem:
        return False
    return all(node.state is NodeState.READY for node in nodes)
