"""Two nodes are drained at once, one of them towards the other, and undrained at once."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

from migrator.model import MigrationState, NodeState
from node_agent.cli.errors import ApiProblem
from node_agent.drain.resources import Drain, DrainRequest, DrainState, MoveState, UndrainRequest
from node_agent.resources import Node
from tests.integration.cluster.drains import ended, node, open_all, told
from tests.integration.cluster.world import Cluster, Guest, Load, eventually

pytestmark = [pytest.mark.lab, pytest.mark.timeout(180)]

HOMES = {"twin1": "n1", "twin2": "n2"}
LOAD = Load(dirty_pages_per_s=200, memory_mib=16, udp=False)


@pytest.fixture
def guests(cluster: Cluster) -> Iterator[list[Guest]]:
    """Each on its home."""
    with contextlib.ExitStack() as stack:
        stack.callback(open_all, cluster)
        yield [stack.enter_context(cluster.guest(*each, LOAD)) for each in HOMES.items()]


def drain(cluster: Cluster, name: str) -> Drain:
    return cluster.api().post(f"/v1/nodes/{name}/drain", Drain, DrainRequest())


def undrain(cluster: Cluster, name: str, via: str) -> Drain:
    return cluster.api(via).post(f"/v1/nodes/{name}/undrain", Drain, UndrainRequest())


def done(cluster: Cluster, begun: Drain) -> Drain:
    over = ended(cluster, begun.id)
    assert over.state is DrainState.DONE, told(over)
    return over


def test_guests_that_two_drains_have_carried_come_home(
    cluster: Cluster, guests: list[Guest]
) -> None:
    """`twin1` is on its way to n2 when n2 is drained: it goes on to n3, and home from there."""
    api = cluster.api()
    api.post("/v1/nodes/n3/cordon", Node)
    with cluster.held("destination", "Prepared") as point:
        first = drain(cluster, "n1")
        point.wait_reached()
        with pytest.raises(ApiProblem, match=rf"drain {first.id} of node n1 is under way"):
            undrain(cluster, "n1", via="n3")
        api.post("/v1/nodes/n3/uncordon", Node)
        second = drain(cluster, "n2")
    assert [move.destination for move in done(cluster, first).moves] == ["n2"]
    moved = done(cluster, second).moves
    assert {(move.domain, move.destination) for move in moved} == {(each, "n3") for each in HOMES}
    for name in HOMES.values():
        assert node(cluster, name).state is NodeState.DRAINED
        eventually(f"{name} is empty", lambda name=name: not cluster.qemus(name, "twin"))  # type: ignore[misc]
    with pytest.raises(ApiProblem, match="2 of its domains can't leave; nothing was moved"):
        drain(cluster, "n3")

    back = undrain(cluster, "n1", via="n3"), undrain(cluster, "n2", via="n1")
    home, rest = (done(cluster, each) for each in back)
    assert [(move.domain, move.state) for move in home.moves] == [("twin1", MoveState.MOVED)]
    # What another test has powered off by a drain of n2, and deleted, is told of, too.
    assert {move.domain: move.state for move in rest.moves if move.domain in HOMES} == {
        "twin1": MoveState.GONE,
        "twin2": MoveState.MOVED,
    }, told(rest)
    assert {guest.name: guest.node for guest in guests} == HOMES
    for guest in guests:
        eventually(f"{guest.name} is alone", lambda guest=guest: guest.copies() == [guest.node])  # type: ignore[misc]
        guest.verify()
        moves = cluster.migrations_of(guest.name)
        assert {each.state for each in moves} == {MigrationState.COMPLETED}
    assert [len(cluster.migrations_of(name)) for name in HOMES] == [3, 2]
