"""A silent node's domain is taken over by an operator; the node that comes back gives way."""

from __future__ import annotations

import signal

import pytest

from deploy.guest.protocol import READY
from deploy.lab.processes import send_signal
from migrator.model import DomainState, NodeState
from node_agent.cli.errors import ApiProblem
from node_agent.events import EventKind
from node_agent.resources import Domain, NodeList, StartRequest, TakeoverRequest
from tests.integration.cluster.world import READY_S, Cluster, Load, eventually

pytestmark = [pytest.mark.lab, pytest.mark.timeout(240)]

LOAD = Load(udp=False, memory_mib=4)
DISK_LOAD = Load(disk=True, udp=False, memory_mib=4)


def test_a_silent_nodes_domain_starts_elsewhere_and_its_stale_copy_is_ended(
    cluster: Cluster,
) -> None:
    with (
        cluster.guest("stranded", "n1", DISK_LOAD) as stranded,
        cluster.guest("stale", "n1", LOAD) as stale,
    ):
        with pytest.raises(ApiProblem, match="runs on n1") as refused:
            start = StartRequest(node="n2")
            cluster.api("n2").post(f"/v1/domains/{stranded.name}/start", Domain, start)
        assert refused.value.problem.status == 409
        with pytest.raises(ApiProblem, match="n1 is ready: stop or migrate it"):
            take_over(cluster, stranded.name)
        agent = cluster.agent("n1")
        send_signal(agent, signal.SIGSTOP)
        try:
            eventually("n1 is silent", lambda: silent(cluster))
            with pytest.raises(ApiProblem, match=r"pool default .* can't shut n1 out of volume"):
                take_over(cluster, stranded.name)
            assert cluster.domain(stranded.name, "n2").node == "n1"
            cluster.kill(cluster.qemus("n1", stranded.name)[0])  # As good as off.
            taken = take_over(cluster, stranded.name, powered_off="n1")
            assert (taken.node, taken.state) == ("n2", DomainState.RUNNING)
            take_over(cluster, stale.name, powered_off="n1")  # Which isn't true.
            assert sorted(stale.copies()) == ["n1", "n2"]
        finally:
            send_signal(agent, signal.SIGCONT)
        eventually("it serves on n2", lambda: READY in stranded.console("n2"), READY_S)
        stranded.stop()
        disk = stranded.check_disk()
        assert disk.intact, disk.problems
        eventually("n1 ends its copy", lambda: stale.copies() == ["n2"])
        eventually("it is told", lambda: told(cluster, EventKind.DOMAIN_DESTROYED, "n1"))
        assert cluster.domain(stale.name).node == "n2"


def take_over(cluster: Cluster, domain: str, powered_off: str | None = None) -> Domain:
    """To n2."""
    body = TakeoverRequest(node="n2", powered_off=powered_off)
    return cluster.api("n2").post(f"/v1/domains/{domain}/takeover", Domain, body)


def silent(cluster: Cluster) -> bool:
    nodes = cluster.api("n2").get("/v1/nodes", NodeList).nodes
    away = [node for node in nodes if node.name == "n1" and node.state is NodeState.UNREACHABLE]
    return any(not node.judged_in_s for node in away)


def told(cluster: Cluster, kind: EventKind, node: str) -> bool:
    return any(event.kind == kind and event.node == node for event in cluster.events("n2"))
