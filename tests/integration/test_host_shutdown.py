"""A host's shutdown and its next boot: what becomes of its guests. systemd calls this command."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from deploy import lab
from deploy.guest.protocol import READY
from migrator.model import DomainState, MigrationState, NodeState
from node_agent.cli.errors import ApiProblem, ExitCode
from node_agent.resources import Domain, Node, StartRequest
from tests.integration.cluster.reboots import after_reboot
from tests.integration.cluster.world import Cluster, Guest, Load, alone_at, eventually

pytestmark = [pytest.mark.lab, pytest.mark.timeout(240)]

LOAD = Load(memory_mib=16, dirty_pages_per_s=200, udp=False, disk=True)
COMMAND_S = 120.0


@pytest.fixture
def guest(cluster: Cluster) -> Iterator[Guest]:
    """On n1, whose agent serves everybody again afterwards."""
    with cluster.guest("hostdown", load=LOAD) as made:
        try:
            yield made
        finally:
            lab.restart_agent(cluster.name, "n1")


@contextmanager
def shutdown(cluster: Cluster, timeout_s: float) -> Iterator[Callable[[], str]]:
    """The command, which has begun. Call it: it ends well, and what it said."""
    config = str(cluster.plan.node("n1").config_path)
    arguments = ["node", "shutdown-guests", "--config", config, "--timeout", f"{timeout_s}"]
    with subprocess.Popen(
        [sys.executable, "-m", "node_agent.cli.main", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:

        def end() -> str:
            out, err = process.communicate(timeout=COMMAND_S)
            assert process.returncode == ExitCode.OK, (out, err)
            return out

        try:
            yield end
        finally:
            process.kill()


def shut_down(cluster: Cluster, timeout_s: float) -> str:
    """The same, in one go."""
    with shutdown(cluster, timeout_s) as end:
        return end()


def state_of_n1(cluster: Cluster) -> NodeState:
    """As n2 has it."""
    return cluster.api("n2").get("/v1/nodes/n1", Node).state


def runs_again(cluster: Cluster, guest: Guest) -> None:
    """On n1, started from its disk."""

    def ready() -> bool:
        domain = cluster.domain(guest.name, "n2")
        here = domain.state is DomainState.RUNNING and domain.node == "n1"
        return here and guest.console("n2").count(READY) > 1  # The first is of before.

    eventually(f"{guest.name} runs again", ready, COMMAND_S)
    assert guest.copies() == ["n1"]


def test_guests_are_shut_down_before_their_host_and_start_with_it(
    cluster: Cluster, guest: Guest, tmp_path: Path
) -> None:
    token = cluster.domain(guest.name).token
    assert shut_down(cluster, 60.0) == f"guests that have shut down: {guest.name}\n"
    assert cluster.domain(guest.name).state is DomainState.STOPPED
    assert "FERRY-POWEROFF" in guest.console()
    disk = guest.check_disk()
    assert disk.intact, disk.problems
    with pytest.raises(ApiProblem, match="n1 is going down"):
        cluster.api().post(f"/v1/domains/{guest.name}/start", Domain, StartRequest(node="n1"))
    assert not guest.copies()
    eventually("n2 knows", lambda: state_of_n1(cluster) is NodeState.GOING_DOWN)
    with after_reboot(cluster, "n1", tmp_path):
        runs_again(cluster, guest)
        eventually("n1 is open again", lambda: state_of_n1(cluster) is NodeState.READY)
        assert cluster.domain(guest.name, "n2").token == token + 1


def test_they_are_without_their_agent_too(cluster: Cluster, guest: Guest) -> None:
    """And start again with an agent of the same boot, where the host stays."""
    assert lab.stop_agent(cluster.name, "n1")
    assert shut_down(cluster, 60.0) == f"guests that have shut down: {guest.name}\n"
    assert not guest.copies()
    disk = guest.check_disk()
    assert disk.intact, disk.problems
    lab.start_agent(cluster.name, "n1")
    runs_again(cluster, guest)


def test_a_migration_to_elsewhere_ends_first(cluster: Cluster, guest: Guest) -> None:
    notes = cluster.plan.node("n1").state_path / "restarts.json"
    with cluster.held("source", "AskLeave") as point:
        migration = cluster.migrate(guest.name, "n2")
        point.wait_reached()
        with shutdown(cluster, 60.0) as end:
            eventually("it is noted", lambda: b'"host_ends": true' in notes.read_bytes())
            point.release()
            assert end() == "guests that have shut down: none\n"
    assert cluster.ended(migration.id).state is MigrationState.COMPLETED
    assert guest.node == "n2"
    alone_at(guest, "n2")
    guest.verify()


def test_one_that_would_not_end_in_time_is_cancelled(cluster: Cluster, guest: Guest) -> None:
    migration = cluster.migrate(guest.name, "n2", bandwidth_bytes_per_s=65_536)
    cluster.in_state(migration.id, MigrationState.PRECOPY)
    assert shut_down(cluster, 20.0) == f"guests that have shut down: {guest.name}\n"
    over = cluster.ended(migration.id)
    assert over.state is MigrationState.CANCELLED
    assert over.cancelled_by == "n1, which goes down"
    assert not guest.copies()
    lab.restart_agent(cluster.name, "n1")
    runs_again(cluster, guest)
