"""A lab whose state is in a real etcd of three members, which die while guests run and move."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from deploy import lab
from deploy.guest.build import build_guest, default_cache_directory
from deploy.lab.kinds import StoreKind
from deploy.lab.lab import etcd_member
from migrator.model import MigrationState, NodeState
from node_agent.cli.errors import ApiProblem
from node_agent.drain.resources import Drain, DrainState, MoveState
from node_agent.resources import Node, NodeList
from tests.integration.cluster.world import Cluster, Guest, Load, eventually

pytestmark = [pytest.mark.lab, pytest.mark.timeout(240)]

MEMBERS = ("etcd1", "etcd2", "etcd3")


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
    with etcd_cluster.guest("web", load=Load(dirty_pages_per_s=500)) as guest:
        yield guest


@pytest.fixture
def members(etcd_cluster: Cluster) -> Iterator[None]:
    """All members run before and after."""
    yield
    for member in MEMBERS:
        etcd_member(etcd_cluster.name, member, run=True)
    eventually("the agents have a store again", lambda: _answers(etcd_cluster))


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
    moving = etcd_cluster.migrate("web", guest.other_node(), bandwidth_bytes_per_s=40_000_000)
    etcd_cluster.in_state(moving.id, MigrationState.PRECOPY)
    assert etcd_member(etcd_cluster.name, member, run=False)
    ended = etcd_cluster.ended(moving.id)
    assert ended.state is MigrationState.COMPLETED, ended
    eventually("one copy is left", lambda: guest.copies() == [ended.destination])
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


def _all_ready(cluster: Cluster) -> bool:
    nodes = cluster.api().get("/v1/nodes", NodeList).nodes
    return all(node.state is NodeState.READY for node in nodes)
