"""Two nodes with VLAN-aware bridges, a switch between them, and a client in each of three VLANs.

    guest ── tap ── br0 ── up0 ═══ sw-near ─┐
             near, 192.0.2.1                ├── sw0 ── m1, m7, m8 ═══ c1, c7, c8: the clients
    guest ── tap ── br0 ── up0 ═══ sw-far ──┘
             far, 192.0.2.2

The trunks carry VLAN 1 untagged, 7 and 8 tagged; each client's port is in one VLAN, untagged. The
switch and the clients are in the near node's namespace.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

from pyroute2 import IPRoute

from netfabric.bridge import BridgeFabric
from netfabric.frames import parse_mac
from netfabric.taps import VNET_HEADER_BYTES
from tests.contract.fabric_worlds import eventually, forwarding
from tests.contract.namespaces import run_in_world
from tests.contract.two_nodes import FAR, NEAR, OtherNode

CLIENTS = (1, 7, 8)
TAGGED = (7, 8)
_SOL_PACKET, _AUXDATA, _OUTGOING = 263, 8, 4
_VLAN_VALID = 1 << 4
_SELF = 2
"""BRIDGE_FLAGS_SELF of linux/if_bridge.h."""
_AUXILIARY = struct.Struct("=IIIHHHH")


class Wire:
    """What comes in by an interface, each frame with its VLAN tag; and what is sent by it."""

    def __init__(self, interface: str) -> None:
        self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
        self._socket.setsockopt(_SOL_PACKET, _AUXDATA, 1)
        self._socket.setblocking(False)
        self._socket.bind((interface, 3))
        self._frames: list[tuple[int | None, bytes]] = []

    def send(self, frame: bytes) -> None:
        self._socket.send(frame)

    def frames(self) -> Sequence[tuple[int | None, bytes]]:
        """All so far: the tag's VLAN, None without a tag, and the frame without it."""
        with contextlib.suppress(BlockingIOError):
            while True:
                frame, control, _, sender = self._socket.recvmsg(4096, 128)
                if sender[2] != _OUTGOING:
                    status, _, _, _, _, tag, _ = _AUXILIARY.unpack_from(control[0][2])
                    self._frames.append((tag & 0xFFF if status & _VLAN_VALID else None, frame))
        return self._frames

    def from_mac(self, mac: bytes) -> list[tuple[int | None, bytes]]:
        return [each for each in self.frames() if each[1][6:12] == mac]

    def close(self) -> None:
        self._socket.close()


class VlanNodes:
    """`there` and `at_far` run what is the far node's."""

    def __init__(self, other: OtherNode, wires: dict[str, Wire]) -> None:
        self.near = BridgeFabric(gaps_s=())
        self.far = BridgeFabric(gaps_s=())
        self.there = other.do
        self.at_far = other.call
        self.wires = wires

    def client(self, vlan_id: int) -> Wire:
        return self.wires[f"c{vlan_id}"]

    async def switch_has(self, mac: str, vlan_id: int) -> str:
        """The switch's port for the MAC in that VLAN; "" if it has none."""
        return (await asyncio.to_thread(entries, "sw0", mac)).get(vlan_id, "")

    async def switch_learns(self, mac: str, vlan_id: int, port: str) -> None:
        async def learnt() -> bool:
            return await self.switch_has(mac, vlan_id) == port

        try:
            await eventually(learnt)
        except TimeoutError as error:
            heard = {name: wire.from_mac(parse_mac(mac)) for name, wire in self.wires.items()}
            found = await asyncio.to_thread(entries, "sw0", mac)
            raise AssertionError(f"{mac} is at {found}, and was heard: {heard}") from error


def entries(bridge: str, mac: str) -> dict[int, str]:
    """Where a bridge of this namespace has the MAC, by VLAN."""
    with IPRoute() as route:
        names = {link["index"]: link.get_attr("IFLA_IFNAME") for link in route.get_links()}
        return {
            entry.get_attr("NDA_VLAN"): names[entry["ifindex"]]
            for entry in route.fdb("dump")
            if entry.get_attr("NDA_LLADDR") == mac
            and names.get(entry.get_attr("NDA_MASTER")) == bridge
            and entry.get_attr("NDA_VLAN")
        }


def set_vlan(port: str, vlan_ids: int | str, *flags: str) -> None:
    """One VLAN, or a range like 2-4094."""
    _vlan("add", port, {"vid": vlan_ids, "flags": list(flags)}, on_bridge=False)


def unset_vlan(port: str, vlan_id: int, *, on_bridge: bool = False) -> None:
    _vlan("del", port, {"vid": vlan_id}, on_bridge=on_bridge)


def _vlan(what: str, port: str, info: dict[str, object], *, on_bridge: bool) -> None:
    """`on_bridge`: the bridge's own membership."""
    flags = {"vlan_flags": _SELF} if on_bridge else {}
    with IPRoute() as route:
        (index,) = route.link_lookup(ifname=port)
        route.vlan_filter(what, index=index, vlan_info=info, **flags)


def send_from_guest(tap: int, frame: bytes) -> None:
    os.write(tap, bytes(VNET_HEADER_BYTES) + frame)


def make_bridge(name: str, **options: int) -> None:
    with IPRoute() as route:
        route.link("add", ifname=name, kind="bridge", br_vlan_filtering=1, **options)
        route.link("set", index=route.link_lookup(ifname=name)[0], state="up")


def attach(port: str, bridge: str) -> None:
    with IPRoute() as route:
        (index,) = route.link_lookup(ifname=port)
        route.link("set", index=index, master=route.link_lookup(ifname=bridge)[0], state="up")


def attach_trunk(port: str, bridge: str) -> None:
    attach(port, bridge)
    for vlan_id in TAGGED:
        set_vlan(port, vlan_id)


def _make_near() -> None:
    _make_underlay("under0", NEAR)
    with IPRoute() as route:
        route.link("add", ifname="up0", kind="veth", peer="sw-near")
        for vlan_id in CLIENTS:
            route.link("add", ifname=f"c{vlan_id}", kind="veth", peer=f"m{vlan_id}")
            (client,) = route.link_lookup(ifname=f"c{vlan_id}")
            route.link("set", index=client, state="up")
    for name in ("br0", "sw0"):
        make_bridge(name)
    attach_trunk("up0", "br0")
    for name in ("sw-near", "sw-far"):
        attach_trunk(name, "sw0")
    for vlan_id in CLIENTS:
        attach(f"m{vlan_id}", "sw0")
        if vlan_id in TAGGED:
            unset_vlan(f"m{vlan_id}", 1)
            set_vlan(f"m{vlan_id}", vlan_id, "pvid", "untagged")


def _make_far(near: int) -> None:
    _make_underlay("under1", FAR)
    with IPRoute() as route:
        peer = {"ifname": "sw-far", "net_ns_fd": near}
        route.link("add", ifname="up0", kind="veth", peer=peer)
    make_bridge("br0")
    attach_trunk("up0", "br0")


def _make_underlay(name: str, address: str) -> None:
    with IPRoute() as route:
        (index,) = route.link_lookup(ifname=name)
        route.addr("add", index=index, address=address, prefixlen=24)
        route.link("set", index=index, state="up")
        route.link("set", index=1, state="up")


@contextlib.asynccontextmanager
async def vlan_nodes() -> AsyncIterator[VlanNodes]:
    """Within a new namespace."""
    other = OtherNode()
    await other.start()
    with contextlib.ExitStack() as stack:
        near = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        stack.callback(os.close, near)
        try:
            await other.call(lambda: _make_far(near))
            await asyncio.to_thread(_make_near)
            members = [f"m{vlan_id}" for vlan_id in CLIENTS]
            await forwarding("up0", "sw-near", "sw-far", *members)
            await other.do(lambda: forwarding("up0"))
            wires = {
                name: stack.enter_context(contextlib.closing(Wire(name)))
                for name in ("sw-near", "sw-far", *(f"c{vlan_id}" for vlan_id in CLIENTS))
            }
            nodes = VlanNodes(other, wires)
            await nodes.near.open()
            await nodes.there(nodes.far.open)
            try:
                yield nodes
            finally:
                await nodes.near.close()
                await nodes.there(nodes.far.close)
        finally:
            await other.stop()


def on_vlans(body: Callable[[VlanNodes], Awaitable[None]]) -> None:
    run_in_world(vlan_nodes, body)
