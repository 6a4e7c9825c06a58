"""`ferry doctor` on a lab's node: healthy, and with each thing broken that it must find."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import msgspec
import pytest
from pyroute2 import IPRoute

from deploy import lab
from deploy.lab.namespaces import netlink_socket
from node_agent.doctor.findings import Diagnosis, Finding, Level
from tests.integration.cluster.world import Cluster

pytestmark = [pytest.mark.lab, pytest.mark.timeout(120)]


def examine(cluster: Cluster, node: str = "n1") -> tuple[int, dict[str, Finding]]:
    """The exit code, and each finding by its check's name."""
    config = str(cluster.plan.node(node).config_path)
    command = [sys.executable, "-m", "node_agent.cli.main", "--json", "doctor", "--config", config]
    vector = lab.command_in(cluster.name, node, command)
    done = subprocess.run(vector, capture_output=True, timeout=60, check=False)
    assert done.stdout, done.stderr.decode()
    diagnosis = msgspec.json.decode(done.stdout, type=Diagnosis)
    assert diagnosis.node == node
    return done.returncode, {each.check: each for each in diagnosis.findings}


@contextmanager
def changed(
    namespace: str, interface: str, before: dict[str, object], now: dict[str, object]
) -> Iterator[None]:
    """The interface as `now` says, and afterwards as it was."""
    with IPRoute(fileno=netlink_socket(namespace)) as route:
        (index,) = route.link_lookup(ifname=interface)
        try:
            route.link("set", index=index, **now)
            yield
        finally:
            route.link("set", index=index, **before)


def test_a_node_of_the_lab_is_healthy(cluster: Cluster) -> None:
    code, found = examine(cluster)
    failures = [each for each in found.values() if each.level is Level.FAILURE]
    assert (code, failures) == (0, [])
    for check in ("kernel", "QEMU", "userfaultfd", "bridge br0", "multicast", "pool default"):
        assert found[check].level is Level.OK, found[check]
    for other in ("n2", "n3"):
        assert found[f"peer port of {other}"].level is Level.OK
        assert found[f"MTU to {other}"].level is Level.OK
        assert found[f"clock of {other}"].level is Level.OK
    assert all(each.mend for each in found.values() if each.level is not Level.OK)


def test_a_link_that_is_too_narrow_on_its_way_is_found(cluster: Cluster) -> None:
    switch = cluster.plan.switch
    with changed(switch, "m-n2", {"mtu": 1500}, {"mtu": 1400}):
        code, found = examine(cluster)
    assert code == 1
    assert found["MTU to n2"].level is Level.FAILURE, found["MTU to n2"]
    assert "1500" in found["MTU to n2"].detail
    assert found["MTU to n3"].level is Level.OK


def test_a_bridge_that_is_too_narrow_for_guests_is_found(cluster: Cluster) -> None:
    namespace = cluster.plan.node("n3").namespace
    with changed(namespace, "br0", {"mtu": 1500}, {"mtu": 1400}):
        code, found = examine(cluster, "n3")
    assert code == 0
    assert found["bridge br0"].level is Level.WARNING
    assert "needs 1500" in found["bridge br0"].detail


def test_a_bridge_without_its_uplink_is_found(cluster: Cluster) -> None:
    namespace = cluster.plan.node("n3").namespace
    with changed(namespace, "uplink0", {"state": "up"}, {"state": "down"}):
        code, found = examine(cluster, "n3")
    assert code == 1
    assert found["bridge br0"].level is Level.FAILURE
    assert "uplink0" in found["bridge br0"].mend
