"""A guest's MAC follows it by EVPN: real FRR daemons on two nodes, a namespace each.

guest ── tap ── br0 ── VXLAN ── under0 ═══════ under1 ── VXLAN ── br9 ── port
                zebra, bgpd     192.0.2.1      192.0.2.2          zebra, bgpd
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import os
import socket
import struct
import subprocess
from collections.abc import Callable
from typing import TypeVar

import msgspec
import pytest
from pyroute2 import IPRoute

from migrator.model import DomainName, NicSpec
from migrator.ports import Tunnel
from netfabric.bridge.tunnels import frames, network_identifier
from netfabric.frames import ethernet, parse_mac
from netfabric.routes.frr.vtysh import Vtysh
from netfabric.rtnetlink import learn
from netfabric.taps import tap_name, tunnel_name
from netfabric.vxlan import Overlay, VxlanFabric
from netfabric.vxlan.overlay import ensure
from node_agent.doctor.findings import Level
from node_agent.doctor.links import check_evpn
from tests.contract.fabric_worlds import eventually
from tests.contract.frr_world import a_folder, configuration, end, start_daemons
from tests.contract.namespaces import run_in_new_namespace, unshare_network

pytestmark = pytest.mark.lab

T = TypeVar("T")
WEB = DomainName("web")
NIC = NicSpec(mac="52:54:00:aa:bb:cc", bridge="br0", addresses=("10.0.0.5",), mtu_bytes=1400)
NEAR, FAR = "192.0.2.1", "192.0.2.2"
NETWORK = 77
TUNNEL = Tunnel(name="m1", local=NEAR, remote=FAR, port=7782)


def configured(address: str, neighbour: str) -> str:
    return configuration(address, neighbour, {"l2vpn evpn": ["advertise-all-vni"]})


class FarNode:
    """The other node; what it is asked is done in its namespace."""

    def __init__(self, executor: concurrent.futures.Executor) -> None:
        self._executor = executor
        self.port_index = 0

    async def do(self, work: Callable[[], T]) -> T:
        return await asyncio.wrap_future(self._executor.submit(work))

    def make(self, near: int) -> None:
        unshare_network()
        with IPRoute() as route:
            peer = {"ifname": "under0", "net_ns_fd": near}
            route.link("add", ifname="under1", kind="veth", peer=peer)
            (index,) = route.link_lookup(ifname="under1")
            route.addr("add", index=index, address=FAR, prefixlen=24)
            route.link("set", index=index, state="up")
            route.link("set", index=1, state="up")
        ensure(Overlay("br9", NETWORK, FAR, (), mtu_bytes=1400, evpn=True))
        with IPRoute() as route:
            route.link("add", ifname="port0", kind="veth", peer="port1")
            (bridge,) = route.link_lookup(ifname="br9")
            (self.port_index,) = route.link_lookup(ifname="port0")
            route.link("set", index=self.port_index, master=bridge, state="up")
            route.link("set", index=route.link_lookup(ifname="port1")[0], state="up")


def make_near() -> None:
    with IPRoute() as route:
        (index,) = route.link_lookup(ifname="under0")
        route.addr("add", index=index, address=NEAR, prefixlen=24)
        route.link("set", index=index, state="up")
        route.link("set", index=1, state="up")


def test_a_guests_mac_follows_it_to_and_fro_by_type_2_routes() -> None:
    async def inside() -> None:
        near = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        daemons: list[subprocess.Popen[bytes]] = []
        fabric = VxlanFabric(Overlay("br0", NETWORK, NEAR, (), mtu_bytes=1400, evpn=True))
        with a_folder() as folder, concurrent.futures.ThreadPoolExecutor(1) as executor:
            far = FarNode(executor)
            try:
                await far.do(lambda: far.make(near))
                await asyncio.to_thread(make_near)
                await fabric.open()
                await is_cut_off(fabric)
                daemons += await asyncio.to_thread(
                    start_daemons, folder / "near", configured(NEAR, FAR)
                )
                daemons += await far.do(
                    lambda: start_daemons(folder / "far", configured(FAR, NEAR))
                )
                await moves(fabric, far, Vtysh(folder / "near"))
            finally:
                await fabric.close()
                await asyncio.to_thread(end, daemons)
                os.close(near)

    run_in_new_namespace(inside)


def leads_to(mac: str) -> str | None:
    """Where the bridge of this thread's namespace has the MAC: a port here, or another node."""
    with IPRoute() as route:
        names = {link["index"]: link.get_attr("IFLA_IFNAME") for link in route.get_links()}
        entries = [each for each in route.fdb("dump") if each.get_attr("NDA_LLADDR") == mac]
    for entry in entries:
        if entry.get_attr("NDA_MASTER") is not None:
            port: str = names[entry["ifindex"]]
            remotes: list[str] = [
                each.get_attr("NDA_DST")
                for each in entries
                if each["ifindex"] == entry["ifindex"] and each.get_attr("NDA_DST") is not None
            ]
            return remotes[0] if remotes else port
    return None


def send_late() -> None:
    """A frame for the guest by the VXLAN to its old node."""
    head = struct.pack("!BxxxI", 0x08, NETWORK << 8)  # RFC 7348, section 5
    frame = ethernet(parse_mac(NIC.mac), b"\x02\x00\x00\x00\x00\x01", 0x88B5, b"late")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        sender.sendto(head + frame, (NEAR, 4789))


async def is_cut_off(fabric: VxlanFabric) -> None:
    """Before FRR has said anything: a guest isn't to come, and the doctor knows why."""
    report = await fabric.hear_wide(NIC, b"12345678", 0.01)
    assert "no other node" in report.cut_off
    finding = await asyncio.to_thread(check_evpn, "br0")
    assert finding.level is Level.FAILURE


async def moves(fabric: VxlanFabric, far: FarNode, vtysh: Vtysh) -> None:
    async def led_here() -> bool:
        here = await asyncio.to_thread(leads_to, NIC.mac)
        return here == tap_name(WEB, 0) and await far.do(lambda: leads_to(NIC.mac)) == NEAR

    async def led_away() -> bool:
        there = await far.do(lambda: leads_to(NIC.mac))
        return there == "port0" and await asyncio.to_thread(leads_to, NIC.mac) == FAR

    async def forwarded() -> bool:
        return (await asyncio.to_thread(lambda: frames([tunnel_name(WEB, 0)])))[1] == 1

    async def moved(times: int) -> bool:  # The kernel has it some ms before zebra says so.
        return await sequence(vtysh) == times

    async def leads_on() -> bool:
        return (await fabric.hear_wide(NIC, b"12345678", 0.01)).cut_off == ""

    fd = await fabric.plug(WEB, 0, NIC)
    try:
        await fabric.announce(WEB, [NIC])
        await fabric.announce(WEB, ())
        await eventually(led_here)
        await eventually(leads_on)
        assert (await asyncio.to_thread(check_evpn, "br0")).level is Level.OK
        await fabric.prepare_departure(WEB, [NIC], TUNNEL)
        await far.do(lambda: learn(far.port_index, parse_mac(NIC.mac)))  # It opens its port.
        await fabric.divert(WEB)
        await fabric.shut(WEB)
        await eventually(led_away)
        await eventually(lambda: moved(1))
        # Whoever hasn't heard of it still sends here.
        await far.do(send_late)
        await eventually(forwarded)
        assert await fabric.end_departure(WEB) == 1
        assert await led_away()
    finally:
        os.close(fd)
    await fabric.unplug(WEB, 0)
    fd = await fabric.plug(WEB, 0, NIC)
    try:  # And it comes back.
        await fabric.prepare_arrival(WEB, [NIC], TUNNEL)
        assert await led_away(), "not yet"
        await fabric.open_arrival(WEB)
        assert fabric.announce_now(WEB) is not None
        await eventually(led_here)
        await eventually(lambda: moved(2))
        await fabric.end_arrival(WEB)
        assert await led_here()
        # FRR looks at the bridge again when a tunnel's end comes into it, and finds nothing new.
        await fabric.prepare_departure(WEB, [NIC], TUNNEL)
        await eventually(lambda: knows(vtysh, network_identifier(TUNNEL.name, 0)))
        assert await sequence(vtysh) == 2
        await fabric.end_departure(WEB)
    finally:
        os.close(fd)


async def knows(vtysh: Vtysh, identifier: int) -> bool:
    """Whether zebra has seen a VXLAN of this identifier come up."""
    found = msgspec.json.decode(await vtysh.run(["show evpn vni json"]))
    return str(identifier) in found


async def sequence(vtysh: Vtysh) -> int:
    """The MAC's mobility sequence number (RFC 7432, section 15)."""
    text = await vtysh.run([f"show evpn mac vni {NETWORK} mac {NIC.mac} json"])
    found = msgspec.json.decode(text)[NIC.mac]
    return max(int(found["localSequence"]), int(found["remoteSequence"]))
