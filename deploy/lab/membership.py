"""A lab's cluster with TLS: founded and joined as real hosts are, with the same commands.

n1 runs `ferry cluster init`; each other node gets a token from n1 and runs `ferry cluster join`.
Their agents, which wait for it, go on by themselves.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Final

from deploy.lab import processes
from deploy.lab.config import API_PORT
from deploy.lab.plan import LabPlan, NodePlan
from deploy.lab.record import LabRecord
from migrator.errors import FerryError
from node_agent.cli.client import ApiClient
from node_agent.config import format_endpoint
from node_agent.trust.records import JoinTokenMade

COMMAND_TIMEOUT_S: Final = 60.0


def ensure(
    plan: LabPlan, record: LabRecord, ready_timeout_s: float, report: Callable[[str], None]
) -> None:
    """Make every node a member that isn't. FerryError says which command failed, and how."""
    first, *others = plan.nodes
    if not is_member(first):
        ferry(first, "cluster", "init", "--cluster", plan.name, "--config", str(first.config_path))
        report(f"{first.name} founded the cluster {plan.name}")
    left = [node for node in others if not is_member(node)]
    if not left:
        return
    agent = record.nodes[0].agent
    assert agent is not None
    processes.wait_healthy(first.name, agent, first.api_socket, first.log_path, ready_timeout_s)
    for node in left:
        join(node, token(first), format_endpoint(first.mgmt_address, API_PORT))
        report(f"{node.name} joined")


def is_member(node: NodePlan) -> bool:
    """Whether it has a certificate."""
    return (node.state_path / "tls" / "certificate.pem").exists()


def token(node: NodePlan) -> str:
    """A new join token, from this member."""
    client = ApiClient(f"unix:{node.api_socket}")
    return client.post("/v1/cluster/tokens", JoinTokenMade).token


def join(node: NodePlan, join_token: str, address: str | None) -> None:
    """Join through `address`; None: whom zeroconf finds."""
    where = [] if address is None else ["--address", address]
    config = ["--config", str(node.config_path)]
    ferry(node, "cluster", "join", "-", *where, *config, given=join_token + "\n")


def ferry(node: NodePlan, *arguments: str, given: str = "") -> str:
    """What `ferry` prints there. FerryError with its own sentence."""
    command = [sys.executable, "-m", "node_agent.cli.main", *arguments]
    done = subprocess.run(
        [sys.executable, "-I", "-S", processes.ENTER_SCRIPT, node.namespace, *command],
        input=given,
        capture_output=True,
        text=True,
        timeout=COMMAND_TIMEOUT_S,
        check=False,
    )
    if done.returncode != 0:
        words = " ".join(arguments[:2])
        raise FerryError(f"ferry {words} on {node.name} failed: {done.stderr.strip()}")
    return done.stdout
