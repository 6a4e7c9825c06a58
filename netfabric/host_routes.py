"""Host routes, and the neighbours that they lead to: single rtnetlink messages (see `rtnetlink`).

    route        RTM_NEWROUTE, RTM_DELROUTE: one address (/32, /128), in the main table
    neighbour    RTM_NEWNEIGH: an address and its MAC for good, or an address to answer for (proxy)
    link         RTM_NEWLINK: up or down

An address may have several routes, told apart by their metric; the kernel takes the lowest.
Every one of ours bears the protocol number PROTOCOL, so that `ip route show proto 111` lists them,
and nobody else's is ever removed. Synchronous, and bounded.
"""

from __future__ import annotations

import enum
import errno
import ipaddress
import socket
import struct
from dataclasses import dataclass
from typing import Final

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from migrator.errors import FabricError
from netfabric.netlink_format import (
    IFF_UP,
    NDA_LLADDR,
    NLM_F_CREATE,
    NLM_F_REPLACE,
    RTM_NEWLINK,
    RTM_NEWNEIGH,
    attribute,
)
from netfabric.rtnetlink import tell

PROTOCOL: Final = 111
"""Of the routes that Ferry makes; free in /etc/iproute2/rt_protos."""

_RTM_NEWROUTE: Final = 24
_RTM_DELROUTE: Final = 25
_RTA_DST: Final = 1
_RTA_OIF: Final = 4
_RTA_GATEWAY: Final = 5
_RTA_PRIORITY: Final = 6
_RTA_PREFSRC: Final = 7
_TABLE_MAIN: Final = 254
_SCOPE_UNIVERSE: Final = 0
_SCOPE_LINK: Final = 253
_UNICAST: Final = 1
_NDA_DST: Final = 1
_NUD_PERMANENT: Final = 0x80
_NTF_PROXY: Final = 0x08
_IFF_ALLMULTI: Final = 0x200
_GONE: Final = frozenset({errno.ESRCH, errno.ENOENT, errno.ENODEV})

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


class Metric(enum.IntEnum):
    """Which of an address's routes counts. What a routing daemon installs lies between."""

    HERE = 1
    """The guest is here, or about to be, or has just left and is forwarded to."""
    TOLD = 1024
    """Where another node has said that it is."""
    WAITING = 2048
    """Plugged here; counts where nobody else has it."""


@dataclass(frozen=True, slots=True)
class Hop:
    """The interface, and the router on it; None: the address is on the link itself."""

    interface_index: int
    gateway: Address | None = None
    source: Address | None = None
    """This node's own address in what it sends that way itself; None: the kernel chooses."""


def set_route(address: Address, hop: Hop, metric: Metric) -> None:
    """Make the address's route of that metric, or change it in one step. FabricError."""
    payload = _route(address, metric, _SCOPE_LINK if hop.gateway is None else _SCOPE_UNIVERSE)
    payload += attribute(_RTA_OIF, struct.pack("=I", hop.interface_index))
    if hop.gateway is not None:
        payload += attribute(_RTA_GATEWAY, hop.gateway.packed)
    if hop.source is not None:
        payload += attribute(_RTA_PREFSRC, hop.source.packed)
    tell(_RTM_NEWROUTE, NLM_F_CREATE | NLM_F_REPLACE, payload, f"can't route {address}")


def remove_route(address: Address, metric: Metric) -> None:
    """Idempotent. FabricError if the kernel refuses."""
    scope = _SCOPE_UNIVERSE + 255  # RT_SCOPE_NOWHERE: whatever it is.
    payload = _route(address, metric, scope)
    tell(_RTM_DELROUTE, 0, payload, f"can't remove the route of {address}", _GONE)


def set_neighbour(address: Address, interface_index: int, mac: bytes) -> None:
    """The address has this MAC on the interface, for good. FabricError."""
    header = struct.pack(
        "=BxxxiHBB", _family(address), interface_index, _NUD_PERMANENT, 0, _UNICAST
    )
    payload = header + attribute(_NDA_DST, address.packed) + attribute(NDA_LLADDR, mac)
    flags = NLM_F_CREATE | NLM_F_REPLACE
    tell(RTM_NEWNEIGH, flags, payload, f"can't make {address} a neighbour")


def answer_for(address: Address, interface_index: int) -> None:
    """Answer questions for the address on the interface with our own MAC there (proxy)."""
    header = struct.pack("=BxxxiHBB", _family(address), interface_index, 0, _NTF_PROXY, 0)
    flags = NLM_F_CREATE | NLM_F_REPLACE
    tell(RTM_NEWNEIGH, flags, header + attribute(_NDA_DST, address.packed), f"proxy {address}")


def set_up(interface_index: int, *, up: bool) -> None:
    """Raise an interface, or take it down: then nothing passes it, and its routes go. FabricError.

    Nothing happens if it is gone.
    """
    _set_flag(interface_index, IFF_UP, up)


def take_all_multicast(interface_index: int) -> None:
    """The interface takes frames for every multicast MAC, not only for those it was told of."""
    _set_flag(interface_index, _IFF_ALLMULTI, True)


def _set_flag(interface_index: int, flag: int, on: bool) -> None:
    flags = flag if on else 0
    payload = struct.pack("=BxHiII", socket.AF_UNSPEC, 0, interface_index, flags, flag)
    tell(RTM_NEWLINK, 0, payload, "can't switch the interface", _GONE)


def way_to(address: Address, interface: str | None = None) -> Hop | None:
    """How this node reaches an address now (by one interface); None: it doesn't."""
    try:
        with IPRoute() as route:
            extra = {}
            if interface is not None:
                found = route.link_lookup(ifname=interface)
                if not found:
                    return None
                extra["oif"] = found[0]
            messages = list(route.route("get", dst=str(address), **extra))
    except NetlinkError as error:
        if error.code in (errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ENODEV):
            return None
        raise FabricError(f"can't find the way to {address}: {error}") from error
    gateway = messages[0].get_attr("RTA_GATEWAY")
    parsed = None if gateway is None else ipaddress.ip_address(gateway)
    return Hop(messages[0].get_attr("RTA_OIF"), parsed)


def route_of(address: Address, metric: Metric) -> Hop | None:
    """The address's own route of that metric; None: it has none."""
    with IPRoute() as route:
        for message in route.get_routes(family=_family(address), table=_TABLE_MAIN):
            if (
                message.get_attr("RTA_DST") == str(address)
                and message["dst_len"] == address.max_prefixlen
                and message.get_attr("RTA_PRIORITY") == metric
            ):
                gateway = message.get_attr("RTA_GATEWAY")
                parsed = None if gateway is None else ipaddress.ip_address(gateway)
                return Hop(message.get_attr("RTA_OIF"), parsed)
    return None


def interface_of(address: Address) -> str | None:
    """The name of the interface that has this address; None: none has it."""
    with IPRoute() as route:
        for entry in route.get_addr(family=_family(address)):
            if entry.get_attr("IFA_ADDRESS") == str(address):
                (link,) = route.get_links(entry["index"])
                name: str = link.get_attr("IFLA_IFNAME")
                return name
    return None


def _route(address: Address, metric: Metric, scope: int) -> bytes:
    header = struct.pack(
        "=BBBBBBBBI",
        *(_family(address), address.max_prefixlen, 0, 0),
        *(_TABLE_MAIN, PROTOCOL, scope, _UNICAST),
        0,
    )
    priority = attribute(_RTA_PRIORITY, struct.pack("=I", metric))
    return header + attribute(_RTA_DST, address.packed) + priority


def _family(address: Address) -> int:
    return int(socket.AF_INET if address.version == 4 else socket.AF_INET6)
