"""The network's rows of `make bench`: how fast, and how completely, it follows a guest.

    python -m tests.benchmarks.network [--moves 20] [--fabrics bridge,routed,bgp,evpn,vxlan,evpn-l2]
                                       [--parts questions,losses,announcements,tcp]

A lab of three nodes for each fabric, a real guest, host clocks. A thousand numbered questions a
second, never more, go to the guest while it moves to and fro, with forwarding and without; its
announcements are lost; then one TCP stream at full rate does. Prints a row a bar. The losses are
measured on a bridge and on a VXLAN that learns, lost announcements on a bridge only.
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
from tests.benchmarks.tcp import Arrivals, Recovery, recovery
from tests.integration.cluster.client import Download
from tests.integration.cluster.pings import PingWatch
from tests.integration.cluster.world import Cluster, Guest, Load, eventually
from tests.integration.test_routed_network import RouteWatch

TCP_BYTES_PER_S = 1 << 30
TCP_BEFORE_S = 2.0
TCP_AFTER_S = 3.0
SETTLED_S = 6.0
"""The grace time of the last move, and a little more."""
LOST_MOVES = 5
LOSSES_MAX = 5_000
TCP_MOVES = 5
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

    def allows(self, lost: int) -> bool:
        """At a thousand questions a second."""
        return lost <= self.blackout_ms + EDGES

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
    given = parser.parse_args()
    parts = frozenset(map(Part, given.parts.split(",")))
    for fabric in map(FabricKind, given.fabrics.split(",")):
        print(f"--- {fabric}", flush=True)
        _fabric(fabric, given.moves, parts)


def _fabric(fabric: FabricKind, moves: int, parts: frozenset[Part]) -> None:
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
                    _questions(cluster, guest, moves)
                if Part.LOSSES in parts and fabric in LEARNING:
                    _without_forwarding(cluster, guest, moves)
                if Part.ANNOUNCEMENTS in parts and fabric is FabricKind.BRIDGE:
                    _without_announcements(cluster, guest)
                if Part.TCP in parts:
                    _tcp(cluster, guest)
    finally:
        lab.down(name)


def _cutover(cluster: Cluster, move: Migration) -> Cutover:
    return eventually("its cutover", lambda: cluster.migration(move.id).cutover)


def _questions(cluster: Cluster, guest: Guest, count: int) -> None:
    with contextlib.ExitStack() as stack:
        routes = None
        if cluster.plan.is_routed:
            routes = stack.enter_context(RouteWatch(cluster.plan.router))
        pings, moves = _to_and_fro(cluster, guest, count)
        cutovers = [_cutover(cluster, move) for move in moves]
    announced = [each.first_announcement_ms for each in cutovers if each.first_announcement_ms]
    arrived = [each.first_to_guest_ms for each in cutovers if each.first_to_guest_ms is not None]
    waited = [pings.first_question_ms(each.resumed_at_s) for each in cutovers]
    verified = [each.verified_ms for each in cutovers if each.verified_ms is not None]
    row("blackout, ms", spread([move.blackout_ms or 0.0 for move in moves]), "")
    if routes is not None:
        led = [routes.cutover_ms(cutover.resumed_at_s) for cutover in cutovers]
        row("the router's route changed after the resume, ms", spread(led), "300")
    row("first announcement after the resume, ms", spread(announced), "2 median")
    row("first packet at the new place, ms", spread(arrived), "5")
    row("of that: until a question was asked, ms", spread(waited), "")
    row("verified after the resume, ms", spread(verified), f"all of {count}: {len(verified)}")
    lost = f"{pings.lost} of {pings.sent} in {count} moves"
    row("questions lost, with forwarding", lost, "0")
    row("answered twice, out of order", f"{pings.duplicates}, {pings.reordered}", "0, 0")


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


def _without_forwarding(cluster: Cluster, guest: Guest, count: int) -> None:
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
    held = sum(dark.allows(each) for dark, each in zip(darks, lost, strict=True))
    asked = sum(dark.asked(pings.sent_at_s) for dark in darks)
    blackout_ms = sum(dark.blackout_ms for dark in darks)
    measured = f"{sum(lost)}; {asked} asked in {blackout_ms:.0f} ms"
    row("questions lost, without forwarding", measured, f"1 a ms, in all of {count}: {held}")
    excess = [each - dark.blackout_ms for dark, each in zip(darks, lost, strict=True)]
    row("lost beyond one a ms, by move", spread(excess), f"{EDGES}")
    row("questions lost elsewhere", str(pings.lost - sum(lost)), "0")


def _without_announcements(cluster: Cluster, guest: Guest) -> None:
    verified: list[float] = []
    for _ in range(LOST_MOVES):
        node = guest.other_node()
        port = f'iifname "g-{node}" ether saddr {guest.mac} ether type {{ arp, 0x8035 }}'
        rules = _table("bridge", "prerouting", f"{port} quota until 150 bytes counter drop")
        with _dropping(cluster.plan.switch, "bridge", rules):
            cutover = _cutover(cluster, cluster.move("bench", node))
        if cutover.verified_ms is not None:
            verified.append(cutover.verified_ms)
    bar = f"1000; all of {LOST_MOVES}: {len(verified)}"
    row("verified, three announcements lost, ms", spread(verified), bar)


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


def _tcp(cluster: Cluster, guest: Guest) -> None:
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
    back = [each.back_ms for each in found if each.back_ms is not None]
    bar = f"250; all of {len(found)}: {len(back)}"
    row("TCP, MB/s before", _mean_of([each.before_bytes_per_s / 1e6 for each in found]), "")
    row("TCP, MB/s in the 3 s after", _mean_of([e.after_bytes_per_s / 1e6 for e in found]), "90 %")
    row("TCP back at 90 % after the resume, ms", spread(back), bar)
    row("TCP, longest silence after it, ms", spread([each.silence_ms for each in found]), "300")
    row("TCP, segments sent again", str([each.repeated for each in found]), "")


def _mean_of(values: Sequence[float]) -> str:
    return f"{statistics.mean(values):.0f} ({min(values):.0f} to {max(values):.0f})"


def spread(values: list[float]) -> str:
    """Median and worst."""
    if not values:
        return "none"
    return f"{statistics.median(values):.2f} (worst {max(values):.2f})"


def row(what: str, measured: str, bar: str) -> None:
    print(f"{what:48} {measured:32} {bar}", flush=True)


if __name__ == "__main__":
    main()
