"""Post-copy with real guests: it always ends, through engines, agents and links that die meanwhile.

The guest rewrites its memory faster than a capped link carries it, and checks every page that it
touches, throughout and once more at the end.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from deploy import lab
from migrator.model import Migration, MigrationMode, MigrationState
from tests.integration.cluster import inventory
from tests.integration.cluster.client import PacketWatch
from tests.integration.cluster.world import MIB, Cluster, Guest, Load, describe, eventually

pytestmark = [pytest.mark.lab, pytest.mark.timeout(240)]

WITNESS = "n3"
DIRTY_PAGES_PER_S = 6000
CAP_BYTES_PER_S = 12_000_000
"""Less than the guest dirties, and slow enough for a post-copy to be hit in its midst."""
END_S = 90.0
BLACKOUT_SANE_MS = 2000.0
CUT_S = 10.0
COMMAND_S = 20.0


@pytest.fixture(scope="module")
def guest(cluster: Cluster) -> Iterator[Guest]:
    load = Load(
        dirty_pages_per_s=DIRTY_PAGES_PER_S,
        memory_mib=64,
        disk=True,
        guest_memory_bytes=256 * MIB,
    )
    with cluster.guest("muncher", load=load) as guest:
        for _ in range(2):  # What is made once and kept, connections between agents, is.
            cluster.move(guest.name, guest.other_node(), via=WITNESS)
        yield guest


def begin(
    guest: Guest, mode: MigrationMode, timeout_s: float = END_S, cap: int = CAP_BYTES_PER_S
) -> Migration:
    cluster = guest.cluster
    source, destination = guest.node, guest.other_node()
    return cluster.migrate(
        guest.name,
        destination,
        via=source,
        mode=mode,
        bandwidth_bytes_per_s=cap,
        timeout_s=timeout_s,
    )


def finish(guest: Guest, begun: Migration) -> Migration:
    """It completes, one copy is left, and every page is right."""
    ended = guest.cluster.ended(begun.id, via=WITNESS, timeout_s=END_S)
    print(describe(ended))
    assert ended.state is MigrationState.COMPLETED, describe(ended)
    # A source's agent that is killed right after the handoff hadn't published it yet.
    assert (ended.blackout_ms or 0.0) < BLACKOUT_SANE_MS, describe(ended)
    assert guest.node == begun.destination
    eventually("one copy is left", lambda: guest.copies() == [begun.destination])
    guest.verify()
    return ended


def test_hybrid_ends_where_pre_copy_would_not(cluster: Cluster, guest: Guest) -> None:
    before = inventory.take_settled(cluster)
    with PacketWatch(cluster.plan.namespace("client"), guest.udp_port) as packets:
        packets.wait_packets(200)
        ended = finish(guest, begin(guest, MigrationMode.HYBRID))
    assert "postcopy" in [phase.name for phase in ended.timeline], describe(ended)
    assert packets.boots == 1
    assert packets.duplicates == 0
    inventory.assert_nothing_left(cluster, before)


def test_hybrids_timeout_ends_the_iteration_under_way(cluster: Cluster, guest: Guest) -> None:
    """The first alone would take some ten seconds."""
    before = inventory.take_settled(cluster)
    slow = CAP_BYTES_PER_S // 2
    ended = finish(guest, begin(guest, MigrationMode.HYBRID, timeout_s=2.0, cap=slow))
    first, *_ = ended.iterations
    assert first.cut_pages > first.pages, describe(ended)  # So in less than half of that time.
    (entered,) = [phase for phase in ended.timeline if phase.name == "post-copy"]
    assert entered.detail == "its time for pre-copy is over"
    assert entered.started_at_s - ended.created_at_s >= 2.0, describe(ended)
    inventory.assert_nothing_left(cluster, before)


def test_post_copy_moves_all_of_it_afterwards(cluster: Cluster, guest: Guest) -> None:
    before = inventory.take_settled(cluster)
    finish(guest, begin(guest, MigrationMode.POSTCOPY))
    inventory.assert_nothing_left(cluster, before)
    cluster.move(guest.name, guest.other_node(), via=WITNESS)  # Its memory can be tracked again.
    guest.verify()


@pytest.mark.parametrize("process", ["engine", "agent"])
@pytest.mark.parametrize("role", ["source", "destination"])
def test_a_kill_in_post_copy_costs_only_time(
    cluster: Cluster, guest: Guest, role: str, process: str
) -> None:
    before = inventory.take_settled(cluster)
    begun = begin(guest, MigrationMode.POSTCOPY)
    cluster.in_state(begun.id, MigrationState.POSTCOPY, via=begun.source)
    node = begun.source if role == "source" else begun.destination
    victim = cluster.agent(node) if process == "agent" else cluster.engines(node)[0]
    cluster.kill(victim)
    cluster.restart_missing_agents()
    finish(guest, begun)
    inventory.assert_nothing_left(cluster, before, connections_change=True)


def test_a_link_that_is_cut_in_post_copy_costs_only_time(cluster: Cluster, guest: Guest) -> None:
    begun = begin(guest, MigrationMode.POSTCOPY)
    cluster.in_state(begun.id, MigrationState.POSTCOPY, via=begun.source)

    def set_link(state: str) -> None:
        command = ["ip", "link", "set", f"m-{begun.destination}", state]
        assert lab.run_in(cluster.name, "switch", command, COMMAND_S).returncode == 0

    try:
        set_link("down")
        time.sleep(CUT_S)
    finally:
        set_link("up")
    finish(guest, begun)
