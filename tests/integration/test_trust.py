"""A cluster that was founded and joined with `ferry`'s own commands: all is mutual TLS, and who is
removed stays out. Three nodes in namespaces, real agents, a real guest.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy import lab
from deploy.guest.build import build_guest, default_cache_directory
from deploy.lab import membership
from deploy.lab.config import API_PORT, PEER_PORT
from migrator.model import MigrationState, NodeState
from node_agent.cli.errors import ApiProblem, ExitCode
from node_agent.resources import Node, NodeList
from node_agent.trust.records import ApiTokenMade, ClusterView, Role, User, UserCreate
from tests.integration.cluster.world import (
    UNHEARD_UDP_PER_S,
    Cluster,
    Load,
    describe,
    eventually,
)

pytestmark = pytest.mark.lab

COMMAND_S = 60.0
INTRUDER = """
import socket, sys
with socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=20) as connection:
    connection.settimeout(20)
    connection.sendall(b"FY\\x01\\x01\\x00\\x00\\x00\\x00")
    try:
        while connection.recv(4096):
            pass
    except ConnectionResetError:
        pass
"""


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    name = f"s{os.getpid()}"
    try:
        lab.up(name, nodes=3, node_memory_bytes=1024**3, tls=True)
        image = build_guest(default_cache_directory())
        yield Cluster(lab.load(name).plan, image, tmp_path_factory.mktemp("holds"))
    finally:
        lab.down(name)


def ready(cluster: Cluster, via: str = "n1") -> set[str]:
    nodes = cluster.api(via).get("/v1/nodes", NodeList).nodes
    return {node.name for node in nodes if node.state is NodeState.READY}


def log_of(cluster: Cluster, node: str) -> str:
    return cluster.plan.node(node).log_path.read_text()


def client(cluster: Cluster, home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`ferry` as a user runs it, from the lab's client host."""
    home.mkdir(exist_ok=True)
    command = ["env", "-u", "FERRY_API", "-u", "FERRY_LAB", f"FERRY_CONFIG_HOME={home}"]
    command += [sys.executable, "-m", "node_agent.cli.main", *arguments]
    return lab.run_in(cluster.name, "client", command, COMMAND_S)


def test_a_guest_migrates_between_nodes_that_joined(secured: Cluster) -> None:
    eventually("all are ready", lambda: ready(secured) == {"n1", "n2", "n3"})
    with secured.guest("web", load=Load(udp_per_s=UNHEARD_UDP_PER_S)) as guest:
        migration = secured.move("web", "n2", via="n3")
        assert migration.state is MigrationState.COMPLETED, describe(migration)
        eventually("one copy is left", lambda: guest.copies() == ["n2"])
        guest.verify()
        with pytest.raises(ApiProblem, match="domains run there"):
            secured.api("n1").delete("/v1/nodes/n2?force=true")
        secured.move("web", "n1")
        guest.verify()


def test_every_node_measures_its_way_to_the_others(secured: Cluster) -> None:
    def measured() -> bool:
        found = [secured.api().get(f"/v1/nodes/{name}", Node) for name in ("n1", "n2", "n3")]
        return all(len(node.round_trips_ms) == 2 for node in found)

    eventually("each node has measured both others", measured)


def test_a_stranger_at_the_agents_port_is_refused_and_logged(secured: Cluster) -> None:
    address = secured.plan.node("n1").mgmt_address
    command = [sys.executable, "-c", INTRUDER, address, str(PEER_PORT)]
    assert lab.run_in(secured.name, "client", command, COMMAND_S).returncode == 0
    refused = f"n1 refused {secured.plan.client_mgmt_address}: the TLS handshake failed"
    eventually("it is in the log", lambda: refused in log_of(secured, "n1"))


def test_a_removed_node_is_refused_until_it_joins_again_by_zeroconf(secured: Cluster) -> None:
    plan, gone = secured.plan, secured.plan.node("n3")
    secured.api().delete("/v1/nodes/n3")
    eventually("its agent ends", lambda: not secured.processes("n3"))
    told = "To come back: `ferry cluster token` on a member"
    assert told in log_of(secured, "n3")
    start = [sys.executable, "-m", "node_agent", "--config", str(gone.config_path)]
    again = lab.run_in(secured.name, "n3", start, COMMAND_S)
    assert again.returncode == ExitCode.REMOVED, "systemd leaves it at that"
    assert told in again.stderr
    assert ready(secured) == {"n1", "n2"}
    members = secured.api("n2").get("/v1/cluster", ClusterView).members
    assert [each.name for each in members if each.removed_at_s is not None] == ["n3"]
    # Its certificate is good by its dates and its signature, and yet:
    probe = lab.run_in(
        secured.name,
        "n3",
        [
            sys.executable,
            str(Path(__file__).with_name("greet_peer.py")),
            str(gone.state_path / "tls"),
            "n3",
            "n2",
            plan.node("n2").mgmt_address,
        ],
        COMMAND_S,
    )
    assert probe.stdout.strip() == "n3 was removed from the cluster", probe
    token = membership.token(plan.node("n2"))  # Which can't sign, and passes the join on to n1.
    membership.ferry(
        gone, "cluster", "join", "-", "--again", "--config", str(gone.config_path), given=token
    )
    lab.start_agent(secured.name, "n3")
    eventually("it is back", lambda: ready(secured, "n3") == {"n1", "n2", "n3"})
    with pytest.raises(Exception, match="was used already, by n3"):
        membership.ferry(
            gone, "cluster", "join", "-", "--again", "--config", str(gone.config_path), given=token
        )


def test_a_user_from_elsewhere_may_what_the_role_says(secured: Cluster, tmp_path: Path) -> None:
    api, node, home = secured.api("n2"), secured.plan.node("n2"), tmp_path / "eve"
    api.post("/v1/users", User, UserCreate(name="eve", role=Role.VIEWER))
    token = api.post("/v1/users/eve/tokens", ApiTokenMade).token
    fingerprint = api.get("/v1/cluster", ClusterView).fingerprint
    server = ["--server", f"{node.mgmt_address}:{API_PORT}", "--fingerprint", fingerprint]
    added = client(secured, home, "context", "add", "lab", *server, "--token", token)
    assert (added.returncode, added.stderr) == (0, ""), added
    refused = client(secured, home, "node", "rm", "n1")
    assert (refused.returncode, refused.stdout) == (ExitCode.NOT_PERMITTED, "")
    assert "the role admin is needed; user eve has the role viewer" in refused.stderr
    api.delete("/v1/users/eve")
