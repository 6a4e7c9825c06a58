"""A real guest whose disk is a LUN: it migrates, and outlives the target's death."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.guest.disk_check import check_disk, describe
from deploy.lab import processes, tgt_server
from deploy.lab.processes import Process, command_of
from migrator.model import Migration
from node_agent.resources import Pool
from tests.integration.cluster.world import Cluster, Guest, Load, eventually

pytestmark = [pytest.mark.lab, pytest.mark.timeout(240)]


class Target:
    """A tgtd in the lab's storage namespace, beside whatever runs there."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self._plan = cluster.plan
        self.folder = folder
        self._process: Process | None = None

    def start(self) -> None:
        command = tgt_server.prepare(self.folder, self._plan.storage_address)
        self._process = processes.spawn_in(
            self._plan.namespace("storage"), command, self.folder / "tgtd.log"
        )
        tgt_server.make_targets(self.folder, self._plan.storage_address)

    def kill(self) -> None:
        if self._process is not None:
            processes.send_signal(self._process, signal.SIGKILL)
            assert not processes.wait_ended([self._process], 30.0)
            self._process = None


@pytest.fixture
def target(cluster: Cluster) -> Iterator[Target]:
    folder = cluster.plan.folder / "test-tgt"
    made = Target(cluster, folder)
    made.folder.mkdir()
    try:
        made.start()
        settings = tgt_server.pool(folder, cluster.plan.storage_address)
        cluster.api().post("/v1/pools", Pool, settings)
        yield made
        cluster.api().delete("/v1/pools/iscsi")
    finally:
        made.kill()


def disk_goes_on(guest: Guest) -> None:
    """Records are written, and acknowledged, from now on."""
    before = guest.status().disk_last_sequence
    eventually("the disk goes on", lambda: guest.status().disk_last_sequence > before + 5)


def fence_ms(migration: Migration) -> float:
    return sum(each.seconds for each in migration.timeline if "fence" in each.name) * 1000


def test_a_guest_on_a_lun_migrates_and_outlives_the_target(
    cluster: Cluster, target: Target
) -> None:
    load = Load(disk=True, udp=False, pool="iscsi", memory_mib=8, dirty_pages_per_s=200)
    with cluster.guest("lun", load=load) as guest:
        (qemu,) = cluster.qemus("n1", "lun")
        secret = (target.folder / "chap").read_text()
        assert not any(secret in word for word in command_of(qemu.pid))
        moved = cluster.move("lun", "n2")
        print(f"fence and resume: {fence_ms(moved):.1f} ms, blackout {moved.blackout_ms} ms")
        disk_goes_on(guest)
        target.kill()
        time.sleep(1.0)  # An outage of a length: the guest waits.
        target.start()
        disk_goes_on(guest)
        cluster.move("lun", "n1")
        disk_goes_on(guest)
        status = guest.verify()
        assert status.disk_corruptions == 0
        guest.stop()
        report = check_disk(target.folder / "volumes" / "lun.raw")
        assert report.intact, describe(report)
        assert report.last_sequence >= status.disk_last_sequence
