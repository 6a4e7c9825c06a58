"""A guest moves between nodes that share no layer 2: host routes follow it, nothing is lost."""

from __future__ import annotations

import concurrent.futures
import ipaddress
import os
import socket
import statistics
import struct
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest
from pyroute2.netlink.rtnl.rtmsg import rtmsg

from deploy import lab
from deploy.guest.build import build_guest, default_cache_directory
from deploy.lab import frr
from deploy.lab.enter import enter
from deploy.lab.kinds import ROUTED_FABRICS, FabricKind
from deploy.lab.plan import GUEST_BRIDGE
from migrator.model import Cutover, Migration
from netfabric import filters
from node_agent.doctor.findings import Level
from node_agent.resources import DryRun, MigrationCreate
from tests.integration.cluster.client import Download, in_namespace
from tests.integration.cluster.pings import PingWatch
from tests.integration.cluster.to_and_fro import cutover_of
from tests.integration.cluster.world import Cluster, Load, describe, eventually
from tests.integration.test_doctor import examine

pytestmark = [pytest.mark.lab, pytest.mark.timeout(240)]

MOVES = 6
RTMGRP_IPV4_ROUTE = 0x40
RTMGRP_IPV6_ROUTE = 0x400
RTM_DELROUTE = 25
STATEFUL = """
table inet ferrytest {
  chain forward {
    type filter hook forward priority 0; policy accept;
    ct state established,related accept
    tcp flags & (syn | ack) == syn ct state new accept
    meta l4proto tcp counter drop
  }
}
"""
"""Whose connection a node hasn't seen begin can't pass it."""
QUIET = Load(udp=False, dirty_pages_per_s=500, ipv6=True)


@pytest.fixture(scope="module", params=ROUTED_FABRICS, ids=str)
def routed(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Cluster]:
    """A lab whose nodes share no layer 2; the routers are told by netlink, BGP or EVPN."""
    name = f"r{os.getpid()}"
    folder: Path = tmp_path_factory.mktemp("holds")
    try:
        lab.up(name, nodes=3, node_memory_bytes=1 << 30, fabric=request.param)
        yield Cluster(lab.load(name).plan, build_guest(default_cache_directory()), folder)
    finally:
        lab.down(name)


@dataclass(frozen=True)
class RouteChange:
    """A message of the kernel's. It stamps none, so the time (wall clock, s) is the reader's."""

    at_s: float
    withdrawn: bool
    hop: str | None


class RouteWatch:
    """What becomes of an address's route in the router's table."""

    def __init__(self, namespace: str, address: str) -> None:
        self._address = str(ipaddress.ip_address(address))  # As pyroute2 spells it.
        self._socket = in_namespace(namespace, lambda: _route_socket(6 if ":" in address else 4))
        self._changes: list[RouteChange] = []

    def changes(self) -> list[RouteChange]:
        """All so far."""
        return list(self._changes)

    def story(self, resumed_s: Sequence[float]) -> str:
        """The changes and the guest's resumes, in order, in seconds since the first of them."""
        told = [
            (each.at_s, "withdrawn" if each.withdrawn else f"led by {each.hop}")
            for each in self.changes()
        ]
        told = sorted([*told, *((each, "resumed") for each in resumed_s)])
        return ", ".join(f"{at_s - told[0][0]:.3f} {what}" for at_s, what in told)

    def __enter__(self) -> RouteWatch:
        self._thread = threading.Thread(target=self._run, name="route watch")
        self._ended = threading.Event()
        self._thread.start()
        return self

    def _run(self) -> None:
        while not self._ended.is_set():
            try:
                content = self._socket.recv(65536)
            except TimeoutError:
                continue
            at_s = time.time()
            while content:
                length, kind = struct.unpack_from("=IH", content)
                message = rtmsg(content[:length])
                message.decode()
                if message.get_attr("RTA_DST") == self._address:  # An earlier guest's may yet go.
                    hop = message.get_attr("RTA_GATEWAY") or message.get_attr("RTA_VIA")
                    change = RouteChange(at_s, kind == RTM_DELROUTE, str(hop))
                    self._changes.append(change)
                content = content[(length + 3) & ~3 :]

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        self._socket.close()

    def cutover_ms(self, resumed_at_s: float) -> float:
        """From the resume to the change of the router's route that is nearest to it."""
        changes = self.changes()
        assert changes, "the router's route never changed"
        return min(((each.at_s - resumed_at_s) * 1e3 for each in changes), key=abs)


def _route_socket(version: int) -> socket.socket:
    opened = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
    opened.bind((0, RTMGRP_IPV4_ROUTE if version == 4 else RTMGRP_IPV6_ROUTE))
    opened.settimeout(0.2)
    return opened


def refusals(cluster: Cluster, domain: str, to: str) -> tuple[str, ...]:
    path = f"/v1/domains/{domain}/migrations?dry_run=true"
    return cluster.api().post(path, DryRun, MigrationCreate(destination=to)).refused


def in_lab(cluster: Cluster, where: str, *command: str) -> str:
    """A command's output there."""
    done = lab.run_in(cluster.name, where, command, 20.0)
    assert done.returncode == 0, done.stderr
    return done.stdout


def wait_led(cluster: Cluster, address: str, node: str) -> None:
    """Until the router leads to that node. How fast it does is `make bench`'s to judge."""
    wanted = f" dev g-{node} "
    if cluster.plan.fabric is FabricKind.EVPN:
        end = cluster.plan.subnet(int(node.removeprefix("n"))).address
        mapped = f"::ffff:{end}" if ":" in address else end
        wanted = f" via {mapped} dev {GUEST_BRIDGE} "
    eventually(
        f"the router leads to {node}",
        lambda: wanted in in_lab(cluster, "router", "ip", "route", "get", address),
    )


def said(
    name: str, pings: PingWatch, cutovers: Sequence[Cutover], moves: Sequence[Migration]
) -> str:
    first = [each.first_announcement_ms or -1.0 for each in cutovers]
    to_guest = [each.first_to_guest_ms or -1.0 for each in cutovers]
    verified = [each.verified_ms or -1.0 for each in cutovers]
    blackouts = [move.blackout_ms or 0.0 for move in moves]
    return (
        f"\n{name}: {len(moves)} moves, {pings.sent} questions: {pings.lost} lost, "
        f"{pings.duplicates} twice, {pings.reordered} out of order; routers told "
        f"+{statistics.median(first):.2f} ms (worst {max(first):.2f}), first to guest "
        f"+{statistics.median(to_guest):.2f} ms (worst {max(to_guest):.2f}), verified "
        f"+{statistics.median(verified):.1f} ms (worst {max(verified):.1f}), "
        f"blackout {statistics.median(blackouts):.1f} ms"
    )


@pytest.mark.parametrize("version", [4, 6])
def test_no_question_to_a_guest_whose_routes_move_is_lost(
    routed: Cluster, capsys: pytest.CaptureFixture[str], version: int
) -> None:
    client = routed.plan.namespace("client")
    name = f"hop{version}"  # A console outlives its guest: another name, another one.
    with routed.guest(name, load=QUIET) as guest:
        address = guest.address if version == 4 else guest.address6
        routed.move(name, "n2")
        routed.move(name, "n1")
        moves: list[Migration] = []
        watch = RouteWatch(routed.plan.router, address)
        with watch as routes, PingWatch(client, address) as pings:
            pings.wait_answers(300)
            for number in range(MOVES):
                node = "n2" if number % 2 == 0 else "n1"
                moves.append(routed.move(name, node))
                wait_led(routed, address, node)
                pings.wait_answers(200)
        cutovers = [cutover_of(routed, move) for move in moves]
        for move, cutover in zip(moves, cutovers, strict=True):
            assert cutover.verified_ms is not None, (describe(move), cutover)
            assert not cutover.problems, cutover
        resumed_s = [cutover.resumed_at_s for cutover in cutovers]
        led_ms = [routes.cutover_ms(cutover.resumed_at_s) for cutover in cutovers]
    with capsys.disabled():
        kind = f"{routed.plan.fabric}, IPv{version}"
        print(said(kind, pings, cutovers, moves))
        print(
            f"the router's route changed +{statistics.median(led_ms):.1f} ms"
            f" (worst {max(led_ms):.1f}) after the resume"
        )
    gone = [each for each in routes.changes() if each.withdrawn]
    assert not gone, f"questions between two routes would be lost: {routes.story(resumed_s)}"
    outcome = (pings.lost, pings.duplicates, pings.reordered)
    assert outcome == (0, 0, 0), (outcome, pings.story(resumed_s))
    eventually(
        "the route is withdrawn with the guest",
        lambda: guest.address not in in_lab(routed, "router", "ip", "route"),
    )


@pytest.mark.parametrize("routed", [FabricKind.BGP, FabricKind.EVPN], indirect=True, ids=str)
def test_a_node_whose_bgp_neighbours_are_down_takes_no_guest(routed: Cluster) -> None:
    code, found = examine(routed, "n2")
    assert (code, found["FRR"].level) == (0, Level.OK), found
    vtysh = ("vtysh", "--vty_socket", str(frr.vty_directory(routed.plan, "n2")))
    neighbours = [
        name
        for family in msgspec.json.decode(
            in_lab(routed, "n2", *vtysh, "-c", "show bgp summary json")
        ).values()
        for name in family["peers"]
    ]

    def tell(command: str) -> None:
        for neighbour in neighbours:
            order = f"{command} {neighbour} shutdown"
            in_lab(
                routed,
                *("n2", *vtysh, "-c", "configure terminal", "-c", f"router bgp {frr.SYSTEM}"),
                *("-c", order),
            )

    with routed.guest("stays", load=Load(udp=False, dirty_pages_per_s=0)):
        tell("neighbor")
        try:
            reasons = eventually(
                "n2 is known to be cut off",
                lambda: [
                    each
                    for each in refusals(routed, "stays", "n2")
                    if "no BGP neighbour is up" in each
                ],
            )
            assert "leads nowhere from n2" in reasons[0]
            code, found = examine(routed, "n2")
            assert (code, found["FRR"].level) == (1, Level.FAILURE), found
        finally:
            tell("no neighbor")
        eventually("n2 is fine again", lambda: not refusals(routed, "stays", "n2"))


def keep_state(cluster: Cluster, node: str) -> None:
    """From now on the node passes on only TCP connections that it knows."""
    enter(cluster.plan.namespace(node))
    filters.run(STATEFUL, "test")
    Path("/proc/sys/net/netfilter/nf_conntrack_tcp_loose").write_text("0")


def forget_rules(cluster: Cluster, node: str) -> None:
    enter(cluster.plan.namespace(node))
    filters.run("delete table inet ferrytest", "test")


@pytest.mark.parametrize("routed", [FabricKind.ROUTED], indirect=True, ids=str)
def test_a_connection_survives_between_nodes_that_pass_only_known_ones(routed: Cluster) -> None:
    with (
        concurrent.futures.ThreadPoolExecutor(1) as n1,
        concurrent.futures.ThreadPoolExecutor(1) as n2,
        routed.guest("state", load=Load(udp=False, dirty_pages_per_s=0)) as guest,
    ):
        n1.submit(keep_state, routed, "n1").result(20)
        n2.submit(keep_state, routed, "n2").result(20)
        try:
            client = routed.plan.namespace("client")
            with Download(client, guest.address, 1 << 20) as download:
                download.wait_bytes(1 << 18)
                for node in ("n2", "n1"):
                    cutover = cutover_of(routed, routed.move("state", node))
                    assert cutover.connections is not None, cutover
                    assert cutover.connections.moved >= 1, cutover
                    assert not cutover.problems, cutover
                    download.wait_bytes(1 << 18)
        finally:
            n1.submit(forget_rules, routed, "n1").result(20)
            n2.submit(forget_rules, routed, "n2").result(20)
