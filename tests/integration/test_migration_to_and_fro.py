"""A guest moves to and fro twenty times under load, and its users can tell by the clock alone."""

from __future__ import annotations

import statistics

import pytest

from migrator.model import Migration
from tests.integration.cluster import inventory
from tests.integration.cluster.client import AnnouncementWatch, Download, PacketWatch
from tests.integration.cluster.world import Cluster, Guest, Load, describe, eventually

pytestmark = [pytest.mark.lab, pytest.mark.timeout(240)]

MOVES = 20
BLACKOUT_SANE_MS = 2000.0
ANNOUNCEMENTS_A_MOVE_MAX = 40
"""Two forms of gratuitous ARP, repeated a few times, and the odd question of the client's."""
LOST_A_MOVE_MAX = 50
"""Packets on their way to the old place at the moment of the move."""


def test_a_guest_migrates_to_and_fro_under_load(
    cluster: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    client = cluster.plan.namespace("client")
    with cluster.guest("web", load=Load(dirty_pages_per_s=2000, disk=True)) as guest:
        cluster.move("web", "n2")  # What is made once and kept, connections between agents, is.
        cluster.move("web", "n1")
        before = inventory.take_settled(cluster)
        with (
            PacketWatch(client, guest.udp_port) as packets,
            Download(client, guest.address, 1_000_000) as download,
            AnnouncementWatch(client) as announcements,
        ):
            packets.wait_packets(500)
            written = guest.status().disk_records_written
            moves, gaps_ms = _to_and_fro(cluster, guest, packets, download)
            status = guest.verify()
        assert guest.node == "n1"
        eventually("one copy is left", lambda: guest.copies() == ["n1"])
        assert status.disk_records_written > written
        assert status.memory_sweeps > 0
        assert packets.boots == 1
        assert packets.duplicates == 0
        assert packets.lost <= LOST_A_MOVE_MAX * MOVES
        assert announcements.frames.total() <= ANNOUNCEMENTS_A_MOVE_MAX * MOVES
        inventory.assert_nothing_left(cluster, before)
        guest.stop()
        _check_disk(guest)
    _print(capsys, moves, gaps_ms, packets, download, announcements)


def _to_and_fro(
    cluster: Cluster, guest: Guest, packets: PacketWatch, download: Download
) -> tuple[list[Migration], list[float]]:
    moves: list[Migration] = []
    gaps_ms: list[float] = []
    for number in range(MOVES):
        move = cluster.move(guest.name, "n2" if number % 2 == 0 else "n1")
        moves.append(move)
        download.wait_bytes(50_000)
        packets.wait_packets(20)
        gaps_ms.append(packets.longest_gap_ms(move.created_at_s, (move.ended_at_s or 0.0) + 0.02))
        assert move.blackout_ms is not None
        assert move.blackout_ms < BLACKOUT_SANE_MS, describe(move)
        assert guest.status().corruptions == 0
    return moves, gaps_ms


def _check_disk(guest: Guest) -> None:
    """Every record whole and in order, and the newest one the guest's own last."""
    report = eventually("the last status is on the console", lambda: guest.report().last_status)
    disk = guest.check_disk()
    assert disk.intact, disk.problems
    assert disk.boot_ids == (int(report.boot_id, 16),)
    # The console is told once a second, the records go on until the very end.
    assert report.disk_last_sequence <= disk.last_sequence <= report.disk_last_sequence + 100


def _print(
    capsys: pytest.CaptureFixture[str],
    moves: list[Migration],
    gaps_ms: list[float],
    packets: PacketWatch,
    download: Download,
    announcements: AnnouncementWatch,
) -> None:
    blackouts = [move.blackout_ms or 0.0 for move in moves]
    totals = [move.total_s or 0.0 for move in moves]
    with capsys.disabled():
        print(
            f"\n{len(moves)} migrations: blackout median {statistics.median(blackouts):.1f} ms, "
            f"worst {max(blackouts):.1f} ms (the issue's bars: 25 and 100); "
            f"total median {statistics.median(totals):.2f} s, worst {max(totals):.2f} s; "
            f"client's gap median {statistics.median(gaps_ms):.1f} ms, worst {max(gaps_ms):.1f} ms;"
            f" {packets.lost} packets lost, {download.received_bytes >> 20} MiB downloaded, "
            f"{dict(announcements.frames)} frames at the client"
        )
