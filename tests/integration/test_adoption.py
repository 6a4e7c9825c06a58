"""Agents are killed and started again; their guests run on, and are found again."""

from __future__ import annotations

import signal
import time

import pytest

from deploy import lab
from deploy.lab.processes import alive, send_signal
from migrator.model import DomainState, MigrationState
from tests.integration.cluster import inventory
from tests.integration.cluster.client import Download, PacketWatch
from tests.integration.cluster.world import Cluster, Load, alone_at, describe, eventually

pytestmark = [pytest.mark.lab, pytest.mark.timeout(240)]

GAP_SANE_MS = 5000.0
"""Twenty such processes on two cores wait for one another, so this isn't a bar. What shows that a
guest lost nothing is that every number of it arrived: it stood still at no time."""
ENDING = "is ending; its guests go on"


def test_guests_outlive_their_agents(cluster: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    client = cluster.plan.namespace("client")
    load = Load(disk=True)
    with cluster.guest("left", "n1", load) as left, cluster.guest("right", "n2", load) as right:
        before = inventory.take_settled(cluster)
        pids = {guest.name: cluster.domain(guest.name).pid for guest in (left, right)}
        with (
            PacketWatch(client, left.udp_port) as from_left,
            PacketWatch(client, right.udp_port) as from_right,
            Download(client, left.address, 500_000) as download,
        ):
            for packets in (from_left, from_right):
                packets.wait_packets(500)
            killed_at_s = time.time()
            for node in cluster.plan.nodes:
                cluster.kill(cluster.agent(node.name))
            dead_at_s = time.time()
            for packets in (from_left, from_right):
                packets.wait_packets(1000)
            download.wait_bytes(100_000)
            for guest in (left, right):
                assert guest.status("/verify").corruptions == 0
            unattended_until_s = time.time()
            cluster.restart_missing_agents()
            adopted_at_s = time.time()
            for packets in (from_left, from_right):
                packets.wait_packets(500)
            for packets in (from_left, from_right):
                assert (packets.lost, packets.duplicates, packets.boots) == (0, 0, 1)
                assert packets.longest_gap_ms(killed_at_s, adopted_at_s) < GAP_SANE_MS
            gap_ms = from_left.longest_gap_ms(killed_at_s, dead_at_s + 0.1)
        assert {guest.name: cluster.domain(guest.name).pid for guest in (left, right)} == pids
        inventory.assert_nothing_left(cluster, before, connections_change=True)
        for guest in (left, right):
            guest.verify()
        # Everything that an agent does with a guest, it does with one that it has adopted.
        assert [left.node, right.node] == ["n1", "n2"]
        cluster.move("left", "n3")
        lab.kill_agent(cluster.name, "n3")
        lab.start_agent(cluster.name, "n3")
        cluster.move("left", "n1")
        left.verify()
        for guest in (left, right):
            guest.stop()
            assert cluster.domain(guest.name).state is DomainState.STOPPED
            assert "FERRY-POWEROFF" in guest.console()
            disk = guest.check_disk()
            assert disk.intact, disk.problems
    with capsys.disabled():
        print(
            f"\nall agents killed: client's longest gap {gap_ms:.1f} ms, no packet lost in "
            f"{unattended_until_s - dead_at_s:.1f} s without agents"
        )


def test_a_source_s_agent_that_is_away_is_told_of_and_its_migration_s_record_goes_on(
    cluster: Cluster,
) -> None:
    """Its silence and its return once each, though two agents see them."""
    with cluster.guest("away", "n1", Load(udp=False)):
        began = cluster.migrate("away", "n2", bandwidth_bytes_per_s=2_000_000)

        def sends() -> bool:
            seen = cluster.migration(began.id, "n1").progress
            return seen.state is MigrationState.PRECOPY and seen.bytes_sent > 3_000_000

        eventually("its first seconds are recorded", sends)
        newest = cluster.events("n2")[-1].seq

        def told() -> list[str]:
            events = [each for each in cluster.events("n2") if each.seq > newest]
            return [each.kind for each in events if each.data.get("node") == "n1"]

        lab.kill_agent(cluster.name, "n1")
        eventually("its silence is told", told)
        lab.start_agent(cluster.name, "n1")
        ended = cluster.ended(began.id)
        eventually("its return is told", lambda: len(told()) > 1)
        assert told() == ["node-silent", "node-back"]
        assert ended.error == "the agent restarted during the migration", describe(ended)
        names = [phase.name for phase in ended.timeline]
        assert names[:5] == ["created", "setup", "precopy", "agent restart", "recovering"]
        assert len(set(names)) == len(names)
        assert ended.progress.bytes_sent > 1_000_000
        away = ended.timeline[3]
        assert away.seconds > 4.0, describe(ended)


@pytest.mark.parametrize(
    ("role", "step"), [("source", "ContinueSwitchover"), ("destination", "Fence")]
)
def test_an_agent_that_is_stopped_lets_a_switchover_end_first(
    cluster: Cluster, role: str, step: str
) -> None:
    """Its guest would stand still until the next agent: for as long as it takes to start one."""
    node = "n1" if role == "source" else "n2"
    with cluster.guest("parting", "n1", Load(udp=False)) as guest:
        with cluster.held(role, step) as point:
            migration = cluster.migrate("parting", "n2", via="n3")
            point.wait_reached()
            agent, log = cluster.agent(node), cluster.plan.node(node).log_path
            ends = log.read_text().count(ENDING)
            send_signal(agent, signal.SIGTERM)
            eventually("it is ending", lambda: log.read_text().count(ENDING) > ends)
            point.release()
            eventually("it has ended", lambda: not alive(agent))
        try:
            assert guest.status("/verify").corruptions == 0
            # The destination's is free to end when its guest runs: the source hears of it then.
            alone_at(guest, "n2")
        finally:
            cluster.restart_missing_agents()
        ended = cluster.ended(migration.id, "n3")
        assert ended.state is MigrationState.COMPLETED, describe(ended)
        guest.verify()
