"""Asking the routers for a NIC: does a packet to its address, sent by this node's uplink, find it?

    node ── uplink ── routers ── wherever they lead the address ── guest
         ICMP echo request, out of the uplink whatever the node's own table says ──►
         ◄── the guest's reply

The old node proves most: a router that still leads there sends the question back, from the node's
own address, and a node takes no packet from outside that claims to be its own.

Synchronous; belongs into a thread.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
import time
from collections.abc import Sequence
from typing import Final

from migrator.errors import FabricError
from migrator.model import NicSpec
from migrator.ports import ProbeReport
from netfabric.host_routes import Address
from netfabric.routed.network import RoutedNetwork, addresses_of, uplink_of

_ECHO_REQUEST: Final = {4: 8, 6: 128}
_ECHO_REPLY: Final = {4: 0, 6: 129}
_TOKEN_BYTES: Final = 8


def probe(network: RoutedNetwork, nic: NicSpec, timeout_s: float) -> ProbeReport:
    """Returns when each address has answered, or after `timeout_s`."""
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
                opened = stack.enter_context(_open(network, version))
                _ask(opened, [each for each in addresses if each.version == version], token)
                sockets[opened] = version
            except (OSError, FabricError) as error:
                failures.append(str(error))
        deadline = time.monotonic() + timeout_s
        while sockets and len(answered) < len(addresses):
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                break
            for ready in select.select(list(sockets), [], [], left_s)[0]:
                found = _answer(ready, sockets[ready], token)
                if found is not None:
                    answered.add(found)
    own = {str(address) for address in addresses}
    return ProbeReport(
        able=bool(sockets),
        answered=tuple(sorted(answered & own)),
        heard=("ipv4",) if answered & own else (),
        routed=True,
        detail="; ".join(failures),
    )


def echo_request(version: int, token: bytes) -> bytes:
    """The ICMP message (RFC 792, RFC 4443). The kernel fills in the checksum of ICMPv6. Pure."""
    message = struct.pack("!BBHHH", _ECHO_REQUEST[version], 0, 0, 0x6665, 1) + token
    if version == 4:
        total = sum(struct.unpack(f"!{len(message) // 2}H", message))
        total = (total & 0xFFFF) + (total >> 16)
        checksum = ~(total + (total >> 16)) & 0xFFFF
        message = message[:2] + checksum.to_bytes(2, "big") + message[4:]
    return message


def _open(network: RoutedNetwork, version: int) -> socket.socket:
    uplink = uplink_of(network, version)
    if uplink is None:
        raise FabricError(f"this node has no IPv{version} uplink into network {network.name}")
    family = socket.AF_INET if version == 4 else socket.AF_INET6
    protocol = socket.IPPROTO_ICMP if version == 4 else socket.IPPROTO_ICMPV6
    opened = socket.socket(family, socket.SOCK_RAW, protocol)
    try:
        opened.setblocking(False)
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, uplink.encode())
    except OSError:
        opened.close()
        raise
    return opened


def _ask(opened: socket.socket, addresses: Sequence[Address], token: bytes) -> None:
    for address in addresses:
        opened.sendto(echo_request(address.version, token), (str(address), 0))


def _answer(ready: socket.socket, version: int, token: bytes) -> str | None:
    try:
        packet, sender = ready.recvfrom(2048)
    except (BlockingIOError, InterruptedError):
        return None
    message = packet[(packet[0] & 0xF) * 4 :] if version == 4 else packet
    if message[:1] != bytes([_ECHO_REPLY[version]]) or message[8:16] != token:
        return None
    address: str = sender[0]
    return address
