"""A question into the overlay, at a node whose own table still leads the guest into a tunnel.

The old node forwards what comes for a guest that has left, by a route of its own, and a routing
daemon installs nothing beside that. So its question takes the way that the daemon would install: to
the node that it believes to have the address, in a frame of the overlay.

    node ── frame for that node's router MAC ── bridge ── VXLAN ═══ that node ── tap ── guest

Synchronous; belongs into a thread.
"""

from __future__ import annotations

import ipaddress
import socket
import struct
from typing import Final

from pyroute2 import IPRoute

from migrator.errors import FabricError
from netfabric.bridge.links import netlink
from netfabric.frames import ETHERTYPE_IPV4, ETHERTYPE_IPV6, ethernet, icmpv6_checksum
from netfabric.host_routes import Address
from netfabric.link_table import Link

_ICMP: Final = 1
_ICMPV6: Final = 58
_HOPS: Final = 64


def send(bridge: str, hop: str, source: Address, target: Address, message: bytes) -> None:
    """Ask `target`, by the node whose end of the overlay is at `hop`. FabricError; OSError."""
    own_mac = _bridge(bridge).mac
    mac = router_mac(bridge, plain(hop))
    if mac is None:
        raise FabricError(f"FRR has entered no router MAC of {hop} into {bridge}")
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0) as opened:
        opened.bind((bridge, 0))
        opened.send(frame(bytes.fromhex(own_mac.replace(":", "")), mac, source, target, message))


def plain(text: str) -> Address:
    """The IPv4 address of one that is mapped into IPv6. Pure."""
    address = ipaddress.ip_address(text)
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        return address.ipv4_mapped
    return address


def frame(own_mac: bytes, mac: bytes, source: Address, target: Address, message: bytes) -> bytes:
    """An ICMP message from one address to another, from router to router. Pure.

    The checksum of ICMPv6 is filled in; that of ICMP must be there.
    """
    if isinstance(source, ipaddress.IPv4Address) or isinstance(target, ipaddress.IPv4Address):
        length = 20 + len(message)
        fields = (0x45, 0, length, 0, 0, _HOPS, _ICMP)
        head = struct.pack("!BBHHHBBH4s4s", *fields, 0, source.packed, target.packed)
        total = sum(struct.unpack("!10H", head))
        total = (total & 0xFFFF) + (total >> 16)
        head = struct.pack("!BBHHHBBH4s4s", *fields, ~total & 0xFFFF, source.packed, target.packed)
        return ethernet(mac, own_mac, ETHERTYPE_IPV4, head + message)
    checksum = icmpv6_checksum(source, target, message)
    message = message[:2] + checksum.to_bytes(2, "big") + message[4:]
    head = struct.pack(
        "!IHBB16s16s", 6 << 28, len(message), _ICMPV6, _HOPS, source.packed, target.packed
    )
    return ethernet(mac, own_mac, ETHERTYPE_IPV6, head + message)


def router_mac(bridge: str, hop: Address) -> bytes | None:
    """What FRR has entered for that node's end; None: nothing. FabricError."""
    return _router_macs(bridge).get(hop)


def ends(bridge: str) -> dict[str, bool]:
    """The ends of the overlay that routes lead to, and whether FRR has entered how. FabricError.

    FRR 8.4 forgets a router MAC when it installs a route anew (its issue 12391); what goes there is
    lost.
    """
    index, known = _bridge(bridge).index, _router_macs(bridge)
    found: dict[str, bool] = {}
    with IPRoute() as route:
        for family in (socket.AF_INET, socket.AF_INET6):
            for message in route.get_routes(family=family, oif=index):
                told = message.get_attr("RTA_GATEWAY")
                if told is not None and message.get_attr("RTA_OIF") == index:
                    found[str(plain(told))] = plain(told) in known
    return found


def _router_macs(bridge: str) -> dict[Address, bytes]:
    index = _bridge(bridge).index
    found: dict[Address, bytes] = {}
    with IPRoute() as route:
        for family in (socket.AF_INET, socket.AF_INET6):
            for entry in route.get_neighbours(family, ifindex=index):
                told, mac = entry.get_attr("NDA_DST"), entry.get_attr("NDA_LLADDR")
                if told is not None and mac is not None:
                    found[plain(told)] = bytes.fromhex(mac.replace(":", ""))
    return found


def _bridge(name: str) -> Link:
    with netlink(f"can't look at {name}") as kernel:
        link = kernel.find(name)
    if link is None:
        raise FabricError(f"there is no {name} here; the agent makes it when it starts")
    return link
