"""The network's rows of `make bench`: how fast, and how completely, it follows a guest.

    python -m tests.benchmarks.network [--moves 20]

A lab of three nodes, a real guest, host clocks. A thousand numbered questions a second go to the
guest while it moves to and fro; then one TCP stream at full rate does. Prints a row a bar.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

from deploy import lab
from deploy.guest.build import build_guest, default_cache_directory
from migrator.model import Cutover, Migration
from tests.integration.cluster.client import Download
from tests.integration.cluster.pings import PingWatch
from tests.integration.cluster.world import Cluster, Guest, Load, eventually

TCP_BYTES_PER_S = 1 << 30
RECOVERED_SHARE = 0.9
TCP_LOOK_S = 3.0
SAMPLE_S = 0.05


def main() -> None:
    """Measure and print; the lab is gone afterwards."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--moves", type=int, default=20)
    moves = parser.parse_args().moves
    name = f"netbench{os.getpid()}"
    try:
        with tempfile.TemporaryDirectory() as holds:
            lab.up(name, nodes=3)
            cluster = Cluster(
                lab.load(name).plan, build_guest(default_cache_directory()), Path(holds)
            )
            with cluster.guest("bench", load=Load(udp=False, dirty_pages_per_s=500)) as guest:
                cluster.move("bench", "n2")
                cluster.move("bench", "n1")
                _questions(cluster, guest, moves)
                _tcp(cluster, guest)
    finally:
        lab.down(name)


def _cutover(cluster: Cluster, move: Migration) -> Cutover:
    return eventually("its cutover", lambda: cluster.migration(move.id).cutover)


def _questions(cluster: Cluster, guest: Guest, count: int) -> None:
    moves: list[Migration] = []
    with PingWatch(cluster.plan.namespace("client"), guest.address) as pings:
        pings.wait_answers(500)
        for number in range(count):
            moves.append(cluster.move("bench", "n2" if number % 2 == 0 else "n1"))
            pings.wait_answers(300)
    cutovers = [_cutover(cluster, move) for move in moves]
    announced = [each.first_announcement_ms for each in cutovers if each.first_announcement_ms]
    arrived = [each.first_to_guest_ms for each in cutovers if each.first_to_guest_ms is not None]
    verified = [each.verified_ms for each in cutovers if each.verified_ms is not None]
    blackouts = [move.blackout_ms or 0.0 for move in moves]
    row("blackout, ms", spread(blackouts), "")
    row("first announcement after the resume, ms", spread(announced), "2 median")
    row("first packet at the new place, ms", spread(arrived), "5")
    row("verified after the resume, ms", spread(verified), f"all of {count}: {len(verified)}")
    lost = f"{pings.lost} of {pings.sent} in {count} moves"
    row("questions lost, with forwarding", lost, "0")
    row("answered twice, out of order", f"{pings.duplicates}, {pings.reordered}", "0, 0")


def _tcp(cluster: Cluster, guest: Guest) -> None:
    client = cluster.plan.namespace("client")
    with Download(client, guest.address, TCP_BYTES_PER_S) as download:
        download.wait_bytes(4 << 20)
        before = _rate(download, time.monotonic() + 1.0)
        move = cluster.move("bench", "n2" if guest.node == "n1" else "n1")
        resumed_at_s = _cutover(cluster, move).resumed_at_s
        after = _rate(download, time.monotonic() + TCP_LOOK_S)
    row("TCP, MB/s before and after", f"{before / 1e6:.0f}, {after / 1e6:.0f}", "90 %")
    row("TCP looked at after the resume, s", f"{time.time() - resumed_at_s:.1f}", "")


def _rate(download: Download, until: float) -> float:
    """The median of short samples, bytes/s."""
    samples: list[float] = []
    while time.monotonic() < until:
        count, at = download.received_bytes, time.monotonic()
        time.sleep(SAMPLE_S)
        samples.append((download.received_bytes - count) / (time.monotonic() - at))
    return statistics.median(samples)


def spread(values: list[float]) -> str:
    """Median and worst."""
    if not values:
        return "none"
    return f"{statistics.median(values):.2f} (worst {max(values):.2f})"


def row(what: str, measured: str, bar: str) -> None:
    print(f"{what:42} {measured:32} {bar}", flush=True)


if __name__ == "__main__":
    main()
