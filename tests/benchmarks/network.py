"""The network's rows of `make bench`: how fast, and how completely, it follows a guest.

    python -m tests.benchmarks.network [--moves 20] [--fabrics bridge,routed,bgp,evpn,vxlan,evpn-l2]
                                       [--parts questions,losses,announcements,tcp]

A lab of three nodes for each fabric, a real guest, host clocks. A thousand numbered questions a
second, never more, go to the guest while it moves to and fro, with forwarding and without; its
announcements are lost; then one TCP stream at full rate does. Prints a row a bar, and writes all of
them to build/bench-network.json. The losses are measured on a bridge and on a VXLAN that learns,
lost announcements on a bridge only.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Final

from deploy import lab
from deploy.guest.build import build_guest, default_cache_directory
from deploy.lab.enter import enter
from deploy.lab.kinds import FabricKind
from migrator.model import Cutover, Migration
from netfabric import filters
from tests.benchmarks.network_rows import Judged, Rows
from tests.benchmarks.site import ROOT
from tests.benchmarks.tcp import Arrivals, Recovery, recovery
from tests.integration.cluster.client import Download
from tests.integration.cluster.pings import PingWatch
from tests.integration.cluster.world import Cluster, Guest, Load, eventually
from tests.integration.test_routed_network import RouteWatch
from tests.interrupts import interruptible

TCP_BYTES_PER_S = 1 << 30
TCP_BEFORE_S = 2.0
TCP_AFTER_S = 3.0
SETTLED_S = 6.0
"""The grace time of the last move, and a little more."""
LOST_MOVES = 5
LOSSES_MAX = 5_000
TCP_MOVES = 10
TUNNEL = "udp dport 7782 counter drop"
"""What forwards is dropped where it leaves: that is found, and nothing is diverted."""


LEARNING: Final = (FabricKind.BRIDGE, FabricKind.VXLAN)
"""The announcement alone moves the guest in these."""

EDGES: Final = 2
"""Of each blackout: a question may be under way when it begins, and when it ends."""
BESIDE_S: Final = 0.05
"""So near to a blackout a loss is its own."""


@dataclass(frozen=True, slots=True)
class Dark:
    """One move's blackout: its end, by the host's clock, and how long it was."""

    until_s: float
    blackout_ms: float

    def asked(self, asked_at_s: Sequence[float]) -> int:
        """How many of these questions were asked in it."""
        return self._within(asked_at_s, 0.0)

    def lost(self, lost_at_s: Sequence[float]) -> int:
        """How many of these losses are its own."""
        return self._within(lost_at_s, BESIDE_S)

    def _within(self, times_s: Sequence[float], margin_s: float) -> int:
        since_s = self.until_s - self.blackout_ms / 1e3 - margin_s
        return sum(since_s <= each <= self.until_s + margin_s for each in times_s)


class Part(StrEnum):
    """What is measured of a fabric."""

    QUESTIONS = "questions"
    LOSSES = "losses"
    ANNOUNCEMENTS = "announcements"
    TCP = "tcp"


def main() -> None:
    """Measure and print; the labs are gone afterwards."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--moves", type=int, default=20)
    parser.add_argument("--fabrics", default="bridge,routed,bgp")
    parser.add_argument("--parts", default=",".join(Part))
    parser.add_argument("--output", type=Path, default=ROOT / "build", help="folder of the rows")
    given = parser.parse_args()
    parts = frozenset(map(Part, given.parts.split(",")))
    rows = Rows(given.output)
    with interruptible("network"):
        for fabric in map(FabricKind, given.fabrics.split(",")):
            rows.begin(fabric)
            _fabric(fabric, given.moves, parts, rows)
    print(f"written: {rows.path}")


def _fabric(fabric: FabricKind, moves: int, parts: frozenset[Part], rows: Rows) -> None:
    name = f"netbench{os.getpid()}"
    try:
        with tempfile.TemporaryDirectory() as holds:
            lab.up(name, nodes=3, fabric=fabric)
            cluster = Cluster(
                lab.load(name).plan, build_guest(default_cache_directory()), Path(holds)
            )
            with cluster.guest("bench", load=Load(udp=False, dirty_pages_per_s=500)) as guest:
                cluster.move("bench", "n2")
                cluster.move("bench", "n1")
                if Part.QUESTIONS in parts:
                    _questions(cluster, guest, moves, rows)
                if Part.LOSSES in parts and fabric in LEARNING:
                    _without_forwarding(cluster, guest, moves, rows)
                if Part.ANNOUNCEMENTS in parts and fabric is FabricKind.BRIDGE:
                    _without_announcements(cluster, guest, rows)
                if Part.TCP in parts:
                    _tcp(cluster, guest, rows)
    finally:
        lab.down(name)


def _cutover(cluster: Cluster, move: Migration) -> Cutover:
    return eventually("its cutover", lambda: cluster.migration(move.id).cutover)


def _questions(cluster: Cluster, guest: Guest, count: int, rows: Rows) -> None:
    with contextlib.ExitStack() as stack:
        routes = None
        if cluster.plan.is_routed:
            routes = stack.enter_context(RouteWatch(cluster.plan.router, guest.address))
        pings, moves = _to_and_fro(cluster, guest, count)
        cutovers = [_cutover(cluster, move) for move in moves]
    rows.add("blackout, ms", [move.blackout_ms for move in moves])
    if routes is not None:
        led = [routes.cutover_ms(cutover.resumed_at_s) for cutover in cutovers]
        rows.add("the router's route changed after the resume, ms", led, 300, Judged.WORST)
    announced = [each.first_announcement_ms for each in cutovers]
    rows.add("first announcement after the resume, ms", announced, 2)
    arrived = [each.first_to_guest_ms for each in cutovers]
    rows.add("first packet at the new place, ms", arrived, 5)
    waited = [pings.first_question_ms(each.resumed_at_s) for each in cutovers]
    rows.add("of that: until a question was asked, ms", waited)
    verified = [each.verified_ms for each in cutovers]
    rows.add("verified after the resume, ms", verified, 1000, Judged.WORST, expected=count)
    lost = f"{pings.lost} of {pings.sent} in {count} moves"
    rows.add("questions lost, with forwarding", [pings.lost], 0, note=lost)
    again = f"{pings.duplicates}, {pings.reordered}"
    rows.add("answered twice, out of order", [pings.duplicates + pings.reordered], 0, note=again)


def _to_and_fro(
    cluster: Cluster, guest: Guest, count: int, **options: int
) -> tuple[PingWatch, list[Migration]]:
    """`options`: of PingWatch."""
    moves: list[Migration] = []
    with PingWatch(cluster.plan.namespace("client"), guest.address, **options) as pings:
        pings.wait_answers(500)
        for number in range(count):
            moves.append(cluster.move("bench", "n2" if number % 2 == 0 else "n1"))
            pings.wait_answers(300)
    return pings, moves


def _without_forwarding(cluster: Cluster, guest: Guest, count: int, rows: Rows) -> None:
    with contextlib.ExitStack() as stack:
        for node in ("n1", "n2"):
            namespace = cluster.plan.namespace(node)
            rules = _table("inet", "output", TUNNEL)
            stack.enter_context(_dropping(namespace, "inet", rules))
        pings, moves = _to_and_fro(cluster, guest, count, waiting_max=LOSSES_MAX)
        cutovers = [_cutover(cluster, move) for move in moves]
    darks = [
        Dark(cutover.resumed_at_s, move.blackout_ms or 0.0)
        for cutover, move in zip(cutovers, moves, strict=True)
    ]
    lost = [dark.lost(pings.lost_at_s) for dark in darks]
    asked = sum(dark.asked(pings.sent_at_s) for dark in darks)
    blackout_ms = sum(dark.blackout_ms for dark in darks)
    measured = f"{sum(lost)}; {asked} asked in {blackout_ms:.0f} ms of blackout"
    rows.add("questions lost, without forwarding", [sum(lost)], note=measured)
    excess = [each - dark.blackout_ms for dark, each in zip(darks, lost, strict=True)]
    rows.add("lost beyond one a ms, by move", excess, EDGES, Judged.WORST, expected=count)
    rows.add("questions lost elsewhere", [pings.lost - sum(lost)], 0, Judged.WORST)


def _without_announcements(cluster: Cluster, guest: Guest, rows: Rows) -> None:
    verified: list[float | None] = []
    for _ in range(LOST_MOVES):
        node = guest.other_node()
        port = f'iifname "g-{node}" ether saddr {guest.mac} ether type {{ arp, 0x8035 }}'
        rules = _table("bridge", "prerouting", f"{port} quota until 150 bytes counter drop")
        with _dropping(cluster.plan.switch, "bridge", rules):
            verified.append(_cutover(cluster, cluster.move("bench", node)).verified_ms)
    name = "verified, three announcements lost, ms"
    rows.add(name, verified, 1000, Judged.WORST, expected=LOST_MOVES)


def _table(family: str, hook: str, rule: str) -> str:
    chain = f"chain c {{ type filter hook {hook} priority 0; {rule}; }}"
    return f"table {family} ferrybench {{ {chain}; }}"


@contextlib.contextmanager
def _dropping(namespace: str, family: str, rules: str) -> Iterator[None]:
    _in_namespace(namespace, lambda: filters.run(rules, "bench"))
    try:
        yield
    finally:
        remove = f"delete table {family} ferrybench"
        _in_namespace(namespace, lambda: filters.run(remove, "bench"))


def _in_namespace(namespace: str, work: Callable[[], str]) -> None:
    def inside() -> None:
        enter(namespace)
        work()

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        pool.submit(inside).result(30)


def _tcp(cluster: Cluster, guest: Guest, rows: Rows) -> None:
    client = cluster.plan.namespace("client")
    found: list[Recovery] = []
    with (
        Arrivals(client, guest.address) as arrivals,
        Download(client, guest.address, TCP_BYTES_PER_S) as download,
    ):
        download.wait_bytes(4 << 20)
        for _ in range(TCP_MOVES):
            time.sleep(SETTLED_S)
            began_s = time.time()
            cutover = _cutover(cluster, cluster.move("bench", guest.other_node()))
            time.sleep(max(0.0, cutover.resumed_at_s + TCP_AFTER_S - time.time()))
            span = (began_s - TCP_BEFORE_S, began_s, cutover.resumed_at_s, TCP_AFTER_S)
            found.append(recovery(arrivals.seen(), *span))
    before = [each.before_bytes_per_s / 1e6 for each in found]
    after = [each.after_bytes_per_s / 1e6 for each in found]
    rows.add("TCP, MB/s before", before, note=_mean_of(before))
    rows.add("TCP, MB/s in the 3 s after", after, note=_mean_of(after))
    back = [each.back_ms for each in found]
    rows.add("TCP back at 90 % after the resume, ms", back, 250, expected=len(found))
    silence = [each.silence_ms for each in found]
    rows.add("TCP, longest silence after it, ms", silence, 300, Judged.WORST)
    repeated = [each.repeated for each in found]
    rows.add("TCP, segments sent again", repeated, note=str(repeated))


def _mean_of(values: Sequence[float]) -> str:
    return f"{statistics.mean(values):.0f} ({min(values):.0f} to {max(values):.0f})"


if __name__ == "__main__":
    main()
