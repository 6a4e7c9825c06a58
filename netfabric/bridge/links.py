"""What the fabric asks of and tells the kernel by rtnetlink: links, bridge ports, learnt MACs.

Everything here is synchronous (1 to 3 ms a call, most of it pyroute2's own) and belongs into a
thread. pyroute2's exceptions end here: FabricError goes up.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkDumpInterrupted, NetlinkError

from migrator.errors import FabricError
from netfabric.bridge.taps import TAP_MTU_BYTES_MAX, TAP_NAME

_IFF_UP: Final = 0x1
_PORT_FORWARDING: Final = 3
_NUD_REACHABLE: Final = 0x02
_NTF_MASTER: Final = 0x04
_AF_BRIDGE: Final = 7
_NDA_LLADDR: Final = 2
_RTM_NEWNEIGH: Final = 28
_NLM_F_REQUEST: Final = 0x1
_NLM_F_ACK: Final = 0x4
_NLM_F_REPLACE: Final = 0x100
_NLM_F_CREATE: Final = 0x400
_LEARN_TIMEOUT_S: Final = 5.0
_ADDRESS_GENERATION_NONE: Final = 1
_VLAN_PVID: Final = 0x2
_VLAN_UNTAGGED: Final = 0x4
_DUMP_TRIES: Final = 3


@dataclass(frozen=True, slots=True)
class Link:
    """One interface. `kind` is the kernel's (bridge, veth, tun...), empty for hardware."""

    index: int
    name: str
    kind: str
    up: bool
    mtu_bytes: int
    master: int | None
    forwarding: bool
    """A bridge port that is up and not blocked by the spanning tree."""
    vlan_filtering: bool
    vlan_ethertype: int


@dataclass(frozen=True, slots=True)
class Vlan:
    """One VLAN of a bridge port: frames of it leave untagged or tagged; pvid: untagged come in."""

    id: int
    pvid: bool
    untagged: bool


class Netlink:
    """One rtnetlink conversation. Use `netlink()`, within one thread."""

    def __init__(self, route: Any) -> None:
        self._route = route

    def links(self) -> list[Link]:
        for attempt in range(_DUMP_TRIES):
            try:
                return [_link(message) for message in self._route.get_links()]
            except NetlinkDumpInterrupted:
                if attempt == _DUMP_TRIES - 1:
                    raise
        raise AssertionError("unreachable")

    def find(self, name: str) -> Link | None:
        """The link of that name; None if there is none."""
        try:
            messages = list(self._route.link("get", ifname=name))
        except NetlinkError as error:
            if error.code in (errno.ENODEV, errno.EINVAL, errno.ERANGE):  # the last: a bad name
                return None
            raise
        return _link(messages[0]) if messages else None

    def vlans(self) -> dict[int, tuple[Vlan, ...]]:
        """The VLANs of every bridge port by the port's index."""
        found: dict[int, tuple[Vlan, ...]] = {}
        for message in self._route.get_vlans():
            specification = message.get_attr("IFLA_AF_SPEC")
            if specification is None:
                continue
            entries = specification.get_attrs("IFLA_BRIDGE_VLAN_INFO")
            found[message["index"]] = tuple(
                Vlan(
                    id=entry["vid"],
                    pvid=bool(entry["flags"] & _VLAN_PVID),
                    untagged=bool(entry["flags"] & _VLAN_UNTAGGED),
                )
                for entry in entries
            )
        return found

    def attach(self, port: Link, bridge: Link, mac: bytes) -> None:
        """Make a tap a port of the bridge, with the bridge's MTU, and bring it up.

        Its MTU is the bridge's and not the NIC's (which is no larger): a bridge that nobody gave
        an MTU takes its ports' smallest, so a small NIC would shrink it for everybody.
        IPv6 generates no address on it: the host has nothing to say to the guest here.
        """
        no_address = {"attrs": [["IFLA_INET6_ADDR_GEN_MODE", _ADDRESS_GENERATION_NONE]]}
        with contextlib.suppress(NetlinkError):  # a kernel without IPv6 refuses
            self._route.link(
                "set", index=port.index, IFLA_AF_SPEC={"attrs": [["AF_INET6", no_address]]}
            )
        self._route.link(
            "set",
            index=port.index,
            address=mac.hex(":"),
            mtu=min(bridge.mtu_bytes, TAP_MTU_BYTES_MAX),
        )
        self._route.link("set", index=port.index, master=bridge.index, state="up")

    def delete(self, link: Link) -> None:
        """Remove a link; no error if it is gone already."""
        try:
            self._route.link("del", index=link.index)
        except NetlinkError as error:
            if error.code != errno.ENODEV:
                raise


@contextlib.contextmanager
def netlink(what: str) -> Iterator[Netlink]:
    """A conversation with the kernel in this thread's network namespace.

    FabricError, beginning with `what`, for whatever the kernel refuses.
    """
    try:
        with IPRoute() as route:
            yield Netlink(route)
    except NetlinkError as error:
        raise FabricError(f"{what}: {os.strerror(error.code)}") from error
    except OSError as error:
        raise FabricError(f"{what}: {error.strerror or error}") from error


def learn(port_index: int, mac: bytes) -> None:
    """Tell the port's bridge that the MAC is behind the port, as if it had learnt it.

    The entry ages and moves as a learnt one does. Under VLAN filtering the kernel makes one for
    each VLAN of the port. FabricError if the port is gone.

    Until this is done the bridge drops what comes in for the guest, so the message is written by
    hand (0.1 ms; a conversation of pyroute2's takes 3 ms): nlmsghdr, ndmsg, one NDA_LLADDR.
    """
    attribute = struct.pack("=HH6s2x", 10, _NDA_LLADDR, mac)
    neighbour = struct.pack("=BxxxiHBB", _AF_BRIDGE, port_index, _NUD_REACHABLE, _NTF_MASTER, 0)
    flags = _NLM_F_REQUEST | _NLM_F_ACK | _NLM_F_REPLACE | _NLM_F_CREATE
    length = 16 + len(neighbour) + len(attribute)
    header = struct.pack("=IHHII", length, _RTM_NEWNEIGH, flags, 1, 0)
    try:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as kernel:
            kernel.settimeout(_LEARN_TIMEOUT_S)
            kernel.sendto(header + neighbour + attribute, (0, 0))
            answer = kernel.recv(4096)
    except OSError as error:
        raise FabricError(f"can't set the bridge's table: {error.strerror or error}") from error
    code = -struct.unpack_from("=i", answer, 16)[0]
    if code:
        raise FabricError(f"can't set the bridge's table: {os.strerror(code)}")


@dataclass(frozen=True, slots=True)
class Exit:
    """A port through which an announcement leaves, and the VLAN tag it needs there, if any."""

    port: str
    vlan_id: int | None = None
    vlan_ethertype: int = 0x8100


@dataclass(frozen=True, slots=True)
class Exits:
    """Where a tap's frames would be flooded to: the uplinks, and other guests' taps."""

    tap_index: int
    uplinks: tuple[Exit, ...]
    guests: tuple[Exit, ...]


def find_exits(kernel: Netlink, tap: str) -> Exits | None:
    """Where the bridge would flood a broadcast that came in by this tap; None: no tap, no bridge.

    Every other forwarding port of the bridge, on the VLAN that the tap's untagged frames are in.
    """
    links = kernel.links()
    own = next((link for link in links if link.name == tap), None)
    bridge = next((link for link in links if own is not None and link.index == own.master), None)
    if own is None or bridge is None:
        return None
    others = [
        link
        for link in links
        if link.master == bridge.index and link.index != own.index and link.forwarding
    ]
    vlans = kernel.vlans() if bridge.vlan_filtering else None
    uplinks: list[Exit] = []
    guests: list[Exit] = []
    for link in others:
        way = _exit(link, own, bridge, vlans)
        if way is not None:
            (guests if TAP_NAME.fullmatch(link.name) else uplinks).append(way)
    return Exits(tap_index=own.index, uplinks=tuple(uplinks), guests=tuple(guests))


def _exit(
    link: Link, own: Link, bridge: Link, vlans: dict[int, tuple[Vlan, ...]] | None
) -> Exit | None:
    if vlans is None:
        return Exit(link.name)
    vlan_id = next((vlan.id for vlan in vlans.get(own.index, ()) if vlan.pvid), None)
    member = next((vlan for vlan in vlans.get(link.index, ()) if vlan.id == vlan_id), None)
    if member is None:
        return None
    if member.untagged:
        return Exit(link.name)
    return Exit(link.name, member.id, bridge.vlan_ethertype)


def _link(message: Any) -> Link:
    information = message.get_attr("IFLA_LINKINFO")
    kind = data = port = None
    if information is not None:
        kind = information.get_attr("IFLA_INFO_KIND")
        if kind == "bridge":
            data = information.get_attr("IFLA_INFO_DATA")
        if information.get_attr("IFLA_INFO_SLAVE_KIND") == "bridge":
            port = information.get_attr("IFLA_INFO_SLAVE_DATA")
    up = bool(message["flags"] & _IFF_UP)
    ethertype = data.get_attr("IFLA_BR_VLAN_PROTOCOL") if data is not None else None
    return Link(
        index=message["index"],
        name=message.get_attr("IFLA_IFNAME"),
        kind=kind or "",
        up=up,
        mtu_bytes=message.get_attr("IFLA_MTU"),
        master=message.get_attr("IFLA_MASTER"),
        forwarding=up
        and port is not None
        and port.get_attr("IFLA_BRPORT_STATE") == _PORT_FORWARDING,
        vlan_filtering=data is not None and bool(data.get_attr("IFLA_BR_VLAN_FILTERING")),
        vlan_ethertype=ethertype or 0x8100,
    )
