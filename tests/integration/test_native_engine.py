"""QEMU's own migration under Ferry's session, with real guests and agents.

QEMU 7.2's own migration loses dirtied pages where it emulates, and the guest's kernel may panic
afterwards. So a guest that was moved is not looked into here; one that stayed checks every page.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from deploy.lab.processes import command_of, send_signal
from migrator.model import EngineKind, Migration, MigrationMode, MigrationState, PassKind
from node_agent.cli.errors import ApiProblem
from node_agent.resources import DryRun, MigrationCreate
from tests.integration.cluster.world import (
    UNHEARD_UDP_PER_S,
    Cluster,
    Guest,
    Load,
    describe,
    eventually,
)

pytestmark = [pytest.mark.lab, pytest.mark.timeout(240)]

WITNESS = "n3"
SLOW_BYTES_PER_S = 4_000_000
"""A first pass then takes much longer than what is done to it."""


LOAD = Load(dirty_pages_per_s=500, memory_mib=16, disk=True, udp_per_s=UNHEARD_UDP_PER_S)


@pytest.fixture(scope="module")
def guest(cluster: Cluster) -> Iterator[Guest]:
    """One that is never moved by QEMU itself."""
    with cluster.guest("native-stays", load=LOAD) as guest:
        yield guest


def begin(guest: Guest, *, slowly: bool = False) -> Migration:
    body = MigrationCreate(
        destination=guest.other_node(),
        engine=EngineKind.NATIVE,
        bandwidth_bytes_per_s=SLOW_BYTES_PER_S if slowly else None,
    )
    path = f"/v1/domains/{guest.name}/migrations"
    return guest.cluster.api().post(path, Migration, body)


def begin_slowly(guest: Guest) -> Migration:
    """One that is sending its first pass."""
    begun = begin(guest, slowly=True)

    def sends() -> bool:
        return guest.cluster.migration(begun.id).progress.bytes_sent > 0

    eventually("the first pass sends", sends)
    return begun


def stayed(guest: Guest, begun: Migration, state: MigrationState) -> Migration:
    """It ended in that state; the guest runs on at its source, whole."""
    ended = guest.cluster.ended(begun.id, via=WITNESS)
    assert ended.state is state, describe(ended)
    assert guest.node == begun.source
    eventually("one copy is left", lambda: guest.copies() == [begun.source])
    guest.verify()
    return ended


def no_guard_is_left(cluster: Cluster) -> None:
    """What a native migration has beside its two hypervisors is gone."""

    def none() -> bool:
        return not any(
            "guard.py" in word
            for node in cluster.plan.nodes
            for each in cluster.processes(node.name)
            for word in command_of(each.pid)
        )

    eventually("the guards end", none)


def test_it_moves_a_guest_through_the_same_handoff(cluster: Cluster) -> None:
    with cluster.guest("native-moves", load=LOAD) as guest:
        token = cluster.domain(guest.name).token
        begun = begin_slowly(guest)
        patched = {"bandwidth_bytes_per_s": None}
        cluster.api().patch(f"/v1/migrations/{begun.id}", Migration, patched)
        ended = cluster.ended(begun.id, via=WITNESS)
        assert ended.state is MigrationState.COMPLETED, describe(ended)
        assert ended.request.engine is EngineKind.NATIVE
        assert ended.timeline[0].name == "engine"
        kinds = [each.kind for each in ended.iterations]
        assert kinds[0] is PassKind.FIRST and kinds[-1] is PassKind.FINAL, kinds
        assert ended.progress.bytes_sent >= ended.iterations[0].bytes_sent > 0
        assert ended.blackout_ms is not None
        moved = cluster.domain(guest.name, via=WITNESS)
        assert (moved.node, moved.token) == ("n2", token + 1)
        eventually("one copy is left", lambda: guest.copies() == ["n2"])
        no_guard_is_left(cluster)


def test_a_cancelled_one_changes_nothing(cluster: Cluster, guest: Guest) -> None:
    begun = begin_slowly(guest)
    cluster.cancel(begun.id)
    ended = stayed(guest, begun, MigrationState.CANCELLED)
    assert ended.blackout_ms is None
    cluster.move(guest.name, guest.other_node())  # By the page engine, in the same process.
    guest.verify()
    no_guard_is_left(cluster)


def test_without_its_agent_the_source_runs_on(cluster: Cluster, guest: Guest) -> None:
    begun = begin_slowly(guest)
    cluster.kill(cluster.agent(begun.source))
    eventually("the destination gave up", lambda: guest.copies() == [begun.source])
    cluster.restart_missing_agents()
    stayed(guest, begun, MigrationState.FAILED)


def test_the_source_agent_dies_when_the_guest_stands_still(cluster: Cluster, guest: Guest) -> None:
    with cluster.held("source", "ContinueSwitchover") as point:
        begun = begin(guest)
        point.wait_reached()
        cluster.kill(cluster.agent(begun.source))
    cluster.restart_missing_agents()
    stayed(guest, begun, MigrationState.FAILED)


def test_the_destination_dies(cluster: Cluster, guest: Guest) -> None:
    begun = begin_slowly(guest)
    for qemu in cluster.qemus(begun.destination, guest.name):
        send_signal(qemu, signal.SIGKILL)
    stayed(guest, begun, MigrationState.FAILED)


def test_post_copy_is_refused_with_the_reason(cluster: Cluster, guest: Guest) -> None:
    body = MigrationCreate(destination="n2", engine=EngineKind.NATIVE, mode=MigrationMode.POSTCOPY)
    path = f"/v1/domains/{guest.name}/migrations"
    with pytest.raises(ApiProblem, match="no post-copy"):
        cluster.api().post(path, Migration, body)
    answer = cluster.api().post(f"{path}?dry_run=true&sample_seconds=0.2", DryRun, body)
    assert answer.engine is EngineKind.NATIVE
    assert any("no post-copy" in reason for reason in answer.refused)
