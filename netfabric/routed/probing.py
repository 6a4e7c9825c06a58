"""Asking the routers for a NIC: does a packet to its address, sent by this node's uplink, find it?

    node ── uplink ── routers ── wherever they lead the address ── guest
         ICMP echo request, out of the uplink whatever the node's own table says ──►
         ◄── the guest's reply

The old node proves most: a router that still leads there sends the question back, from the node's
own address, and a node takes no packet from outside that claims to be its own. By EVPN the node is
such a router itself: it asks as its own table and the overlay have it (`overlay_probing`), and the
reply comes by the uplink.

Synchronous; belongs into a thread.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import os
import socket
import struct
import time
from collections.abc import Mapping, Sequence
from typing import Final

from migrator.errors import FabricError
from migrator.model import NicSpec
from migrator.ports import ProbeReport, WidthReport
from netfabric import capture
from netfabric.host_routes import Address, Metric, route_of
from netfabric.routed import overlay_probing
from netfabric.routed.network import RoutedNetwork, addresses_of, needed_bytes, uplink_of
from netfabric.vxlan.overlay import Overlay

_ECHO_REQUEST: Final = {4: 8, 6: 128}
_ECHO_REPLY: Final = {4: 0, 6: 129}
_TOKEN_BYTES: Final = 8
_ECHO_BYTES: Final = 8
_HEADERS_BYTES: Final = {4: 20 + _ECHO_BYTES, 6: 40 + _ECHO_BYTES}
"""Of IP and of the echo, before what it carries."""
_WIDTH_AGAIN_S: Final = 0.1
_PACKET_BYTES_MAX: Final = 65_535
_IP_MTU_DISCOVER: Final = 10
_IPV6_MTU_DISCOVER: Final = 23
_IPV6_DONTFRAG: Final = 62
_PMTUDISC_PROBE: Final = 3
_NO_WAY: Final = frozenset({errno.ENETUNREACH, errno.EHOSTUNREACH})


def probe(
    network: RoutedNetwork, nic: NicSpec, timeout_s: float, hops: Mapping[Address, str]
) -> ProbeReport:
    """Returns when each address has answered, or after `timeout_s`.

    `hops`: to which end of the overlay FRR leads each address, where there is one.
    """
    if nic.bridge != network.name:
        return ProbeReport(able=False, detail=f"there is no network {nic.bridge} here")
    token = os.urandom(_TOKEN_BYTES)
    addresses = addresses_of(nic)
    failures: list[str] = []
    answered: set[str] = set()
    with contextlib.ExitStack() as stack:
        sockets: dict[socket.socket, int] = {}
        for version in sorted({address.version for address in addresses}):
            try:
                asked = [each for each in addresses if each.version == version]
                if network.overlay is None:
                    opened = stack.enter_context(_open(network, version))
                    _ask(opened, asked, token)
                else:
                    opened = stack.enter_context(_raw(version))
                    _ask_into_overlay(network, network.overlay, opened, asked, token, hops)
                sockets[opened] = version
            except (OSError, FabricError) as error:
                failures.append(str(error))
        deadline = time.monotonic() + timeout_s
        for ready in capture.ready_until(sockets, deadline):
            found = _answer(ready, sockets[ready], token)
            if found is not None:
                answered.add(found)
            if len(answered) == len(addresses):
                break
    own = {str(address) for address in addresses}
    return ProbeReport(
        able=bool(sockets),
        answered=tuple(sorted(answered & own)),
        heard=("ipv4",) if answered & own else (),
        routed=True,
        detail="; ".join(failures),
    )


def width(
    network: RoutedNetwork, nic: NicSpec, hops: Sequence[str], timeout_s: float
) -> WidthReport:
    """Whether the node at `hops` answers short questions, and those of the NIC's MTU.

    In an overlay what counts is whether the nodes' own network carries its outer packets.

    The question may not be fragmented on its way; the answer may. Only where every IP version's
    short ones are answered, and some full one isn't, is anything proved.
    """
    versions = {address.version for address in addresses_of(nic)}
    if network.overlay is not None:
        versions = {ipaddress.ip_address(network.overlay.local).version}
    targets = [hop for hop in map(ipaddress.ip_address, hops) if hop.version in versions]
    token = os.urandom(_TOKEN_BYTES)
    answered: set[tuple[int, bool]] = set()
    wanted: set[tuple[int, bool]] = {
        (hop.version, full) for hop in targets for full in (False, True)
    }
    with contextlib.ExitStack() as stack:
        sockets: dict[socket.socket, tuple[Address, int]] = {}
        for hop in targets:
            try:
                opened = stack.enter_context(_open(network, hop.version, whole=True))
            except (OSError, FabricError):
                continue
            sockets[opened] = hop, needed_bytes(network, nic) - _HEADERS_BYTES[hop.version]
        deadline = time.monotonic() + timeout_s
        while sockets and answered < wanted and (left_s := deadline - time.monotonic()) > 0:
            for opened, (hop, full_bytes) in sockets.items():
                for padding in (0, full_bytes - _TOKEN_BYTES):
                    message = echo_request(hop.version, token.ljust(_TOKEN_BYTES + padding, b"\0"))
                    with contextlib.suppress(OSError):  # EMSGSIZE: this node's own uplink
                        opened.sendto(message, (str(hop), 0))
            until = time.monotonic() + min(left_s, _WIDTH_AGAIN_S)
            _take_widths(sockets, token, until, answered, wanted)
    shorts = {(hop.version, False) for hop in targets}
    return WidthReport(
        short=bool(shorts) and shorts <= answered, full=bool(shorts) and wanted <= answered
    )


def _take_widths(
    sockets: Mapping[socket.socket, tuple[Address, int]],
    token: bytes,
    until: float,
    answered: set[tuple[int, bool]],
    wanted: set[tuple[int, bool]],
) -> None:
    for ready in capture.ready_until(sockets, until):
        hop, full_bytes = sockets[ready]
        message = _echo_reply(ready, hop.version, token)
        if message is not None and message[0] == str(hop):
            answered.add((hop.version, message[1] == full_bytes + _ECHO_BYTES))
        if answered == wanted:
            break


def echo_request(version: int, token: bytes) -> bytes:
    """The ICMP message (RFC 792, RFC 4443). The kernel fills in the checksum of ICMPv6. Pure."""
    message = struct.pack("!BBHHH", _ECHO_REQUEST[version], 0, 0, 0x6665, 1) + token
    if version == 4:
        even = message + bytes(len(message) % 2)
        total = sum(struct.unpack(f"!{len(even) // 2}H", even))
        total = (total & 0xFFFF) + (total >> 16)
        checksum = ~(total + (total >> 16)) & 0xFFFF
        message = message[:2] + checksum.to_bytes(2, "big") + message[4:]
    return message


def _open(network: RoutedNetwork, version: int, *, whole: bool = False) -> socket.socket:
    """`whole`: what is sent may not be fragmented, whatever is known of the way."""
    uplink = uplink_of(network, version)
    if uplink is None:
        raise FabricError(f"this node has no IPv{version} uplink into network {network.name}")
    opened = _raw(version)
    try:
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, uplink.encode())
        if whole and version == 4:
            opened.setsockopt(socket.IPPROTO_IP, _IP_MTU_DISCOVER, _PMTUDISC_PROBE)
        elif whole:
            opened.setsockopt(socket.IPPROTO_IPV6, _IPV6_MTU_DISCOVER, _PMTUDISC_PROBE)
            opened.setsockopt(socket.IPPROTO_IPV6, _IPV6_DONTFRAG, 1)
    except OSError:
        opened.close()
        raise
    return opened


def _ask_into_overlay(
    network: RoutedNetwork,
    overlay: Overlay,
    opened: socket.socket,
    addresses: Sequence[Address],
    token: bytes,
    hops: Mapping[Address, str],
) -> None:
    """The way that packets take from here; or that they would take, were they not forwarded."""
    own = next(hop for hop in network.hops if hop.version == addresses[0].version)
    opened.bind((str(own), 0))
    for address in addresses:
        if route_of(address, Metric.HERE) is None:
            _ask(opened, [address], token)
            continue
        hop = hops.get(address)
        if hop is not None:
            message = echo_request(address.version, token)
            overlay_probing.send(overlay.bridge, hop, own, address, message)


def _raw(version: int) -> socket.socket:
    family = socket.AF_INET if version == 4 else socket.AF_INET6
    protocol = socket.IPPROTO_ICMP if version == 4 else socket.IPPROTO_ICMPV6
    opened = socket.socket(family, socket.SOCK_RAW, protocol)
    opened.setblocking(False)
    return opened


def _ask(opened: socket.socket, addresses: Sequence[Address], token: bytes) -> None:
    for address in addresses:
        try:
            opened.sendto(echo_request(address.version, token), (str(address), 0))
        except OSError as error:
            if error.errno not in _NO_WAY:
                raise


def _answer(ready: socket.socket, version: int, token: bytes) -> str | None:
    found = _echo_reply(ready, version, token)
    return None if found is None else found[0]


def _echo_reply(ready: socket.socket, version: int, token: bytes) -> tuple[str, int] | None:
    """Who has answered, and the message's length; None: it is no answer to this token."""
    try:
        packet, sender = ready.recvfrom(_PACKET_BYTES_MAX)
    except (BlockingIOError, InterruptedError):
        return None
    message = packet[(packet[0] & 0xF) * 4 :] if version == 4 else packet
    if message[:1] != bytes([_ECHO_REPLY[version]]) or message[8:16] != token:
        return None
    address: str = sender[0]
    return address, len(message)
