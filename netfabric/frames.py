"""The frames that tell a network where an address is now. Pure: addresses in, bytes out.

    announcements(nic) ── IPv4 address ──> gratuitous ARP, request form and reply form
                       ── IPv6 address ──> unsolicited neighbour advertisement (NA)
                       ── no address   ──> RARP

The switches on the way learn from the Ethernet source address alone, so any of these moves the
guest's port. The neighbours' caches need nothing from us where the MAC stays the same, which it
does in a migration; the address payload is for caches that are stale for another reason.

ARP has two forms because implementations differ in which one they heed: RFC 5227 section 3
recommends the request form, RFC 5944 section 4.6 allows both. An NA that is not solicited sets
Override and not Solicited (RFC 4861 section 7.2.6). Its Router flag also rewrites what a
neighbour knows of the sender (section 7.2.5): say `router=True` for a guest that routes, else
its neighbours forget it as a router until its next router advertisement.

Frames are padded to 60 bytes, Ethernet's minimum without the checksum.
"""

from __future__ import annotations

import ipaddress
import struct
from collections.abc import Sequence
from typing import Final

from migrator.errors import FabricError
from migrator.model import NicSpec

FRAME_BYTES_MIN: Final = 60
BROADCAST: Final = b"\xff" * 6
ALL_NODES_MAC: Final = bytes.fromhex("333300000001")
ALL_NODES: Final = ipaddress.IPv6Address("ff02::1")

ETHERTYPE_IPV4: Final = 0x0800
ETHERTYPE_ARP: Final = 0x0806
ETHERTYPE_RARP: Final = 0x8035
ETHERTYPE_IPV6: Final = 0x86DD
ETHERTYPE_VLAN: Final = 0x8100
ETHERTYPE_EXPERIMENTAL: Final = 0x88B5
"""For whoever likes, by IEEE 802: nobody else listens to it."""

_ARP_REQUEST: Final = 1
_ARP_REPLY: Final = 2
_RARP_REQUEST: Final = 3
_ICMPV6: Final = 58
_NEIGHBOUR_SOLICITATION: Final = 135
_NEIGHBOUR_ADVERTISEMENT: Final = 136
_FLAG_ROUTER: Final = 0x8000_0000
_FLAG_OVERRIDE: Final = 0x2000_0000
_OPTION_SOURCE_LINK_ADDRESS: Final = 1
_OPTION_TARGET_LINK_ADDRESS: Final = 2


def parse_mac(text: str) -> bytes:
    """Six bytes from `aa:bb:cc:dd:ee:ff`. FabricError if it can't be one NIC's address."""
    try:
        mac = bytes.fromhex(text.replace(":", ""))
    except ValueError as error:
        raise FabricError(f"{text!r} is not a MAC address") from error
    if len(mac) != 6:
        raise FabricError(f"{text!r} is not a MAC address")
    if mac[0] & 1:
        raise FabricError(f"MAC address {text} is a multicast address: no NIC can have it")
    if not any(mac):
        raise FabricError(f"MAC address {text} is all zeros: no NIC can have it")
    return mac


def parse_address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """An address that a guest can own. FabricError for multicast, unspecified, loopback, prefix."""
    try:
        address = ipaddress.ip_address(text)
    except ValueError as error:
        raise FabricError(f"{text!r} is not an IPv4 or IPv6 address") from error
    if address.is_multicast or address.is_unspecified or address.is_loopback:
        raise FabricError(f"{text} is not an address that a guest can own")
    if isinstance(address, ipaddress.IPv6Address) and address.scope_id is not None:
        raise FabricError(f"{text} carries a scope: write the address alone")
    if address == ipaddress.IPv4Address("255.255.255.255"):
        raise FabricError(f"{text} is not an address that a guest can own")
    return address


def announcements(nic: NicSpec) -> tuple[bytes, ...]:
    """Every frame of one round for one NIC, in the order of `nic.addresses`. FabricError."""
    mac = parse_mac(nic.mac)
    if not nic.addresses:
        return (rarp(mac),)
    frames: list[bytes] = []
    for text in nic.addresses:
        address = parse_address(text)
        if isinstance(address, ipaddress.IPv4Address):
            frames += [gratuitous_arp_request(mac, address), gratuitous_arp_reply(mac, address)]
        else:
            frames.append(neighbour_advertisement(mac, address))
    return tuple(frames)


def gratuitous_arp_request(mac: bytes, address: ipaddress.IPv4Address) -> bytes:
    """RFC 5227's ARP announcement: who has ADDRESS? tell ADDRESS. The target MAC is zero."""
    body = _arp(_ARP_REQUEST, mac, address.packed, bytes(6), address.packed)
    return ethernet(BROADCAST, mac, ETHERTYPE_ARP, body)


def gratuitous_arp_reply(mac: bytes, address: ipaddress.IPv4Address) -> bytes:
    """ADDRESS is at MAC, to everybody. RFC 5944 section 4.6: the target MAC is the new one too."""
    body = _arp(_ARP_REPLY, mac, address.packed, mac, address.packed)
    return ethernet(BROADCAST, mac, ETHERTYPE_ARP, body)


def rarp(mac: bytes) -> bytes:
    """RFC 903's request for one's own address. It names none, so it suits a NIC with none known."""
    body = _arp(_RARP_REQUEST, mac, bytes(4), mac, bytes(4))
    return ethernet(BROADCAST, mac, ETHERTYPE_RARP, body)


def neighbour_advertisement(
    mac: bytes, address: ipaddress.IPv6Address, *, router: bool = False
) -> bytes:
    """RFC 4861 section 4.4, unsolicited, from ADDRESS itself to all nodes of the link."""
    flags = _FLAG_OVERRIDE | (_FLAG_ROUTER if router else 0)
    option = struct.pack("!BB6s", _OPTION_TARGET_LINK_ADDRESS, 1, mac)
    message = struct.pack("!BBHI16s", _NEIGHBOUR_ADVERTISEMENT, 0, 0, flags, address.packed)
    message += option
    return ethernet(ALL_NODES_MAC, mac, ETHERTYPE_IPV6, _icmpv6(address, ALL_NODES, message))


def arp_probe(own_mac: bytes, mac: bytes, address: ipaddress.IPv4Address) -> bytes:
    """RFC 5227's ARP probe, sent to one MAC: who has ADDRESS? It names no address of the sender.

    So it changes no table of its receiver, and a switch must know where the MAC is to deliver it.
    """
    body = _arp(_ARP_REQUEST, own_mac, bytes(4), bytes(6), address.packed)
    return ethernet(mac, own_mac, ETHERTYPE_ARP, body)


def neighbour_solicitation(own_mac: bytes, mac: bytes, address: ipaddress.IPv6Address) -> bytes:
    """RFC 4861 section 4.3, sent to one MAC, from the link-local address made of the sender's."""
    own = link_local(own_mac)
    message = struct.pack("!BBHI16s", _NEIGHBOUR_SOLICITATION, 0, 0, 0, address.packed)
    message += struct.pack("!BB6s", _OPTION_SOURCE_LINK_ADDRESS, 1, own_mac)
    return ethernet(mac, own_mac, ETHERTYPE_IPV6, _icmpv6(own, address, message))


def link_local(mac: bytes) -> ipaddress.IPv6Address:
    """RFC 4291 appendix A: fe80:: and the modified EUI-64 of the MAC."""
    identifier = bytes([mac[0] ^ 2]) + mac[1:3] + b"\xff\xfe" + mac[3:]
    return ipaddress.IPv6Address(b"\xfe\x80" + bytes(6) + identifier)


def _icmpv6(
    source: ipaddress.IPv6Address, destination: ipaddress.IPv6Address, message: bytes
) -> bytes:
    """An IPv6 packet of neighbour discovery: hop limit 255, checksum filled in."""
    checksum = icmpv6_checksum(source, destination, message)
    message = message[:2] + checksum.to_bytes(2, "big") + message[4:]
    header = struct.pack(
        "!IHBB16s16s", 6 << 28, len(message), _ICMPV6, 255, source.packed, destination.packed
    )
    return header + message


def ethernet(destination: bytes, source: bytes, ethertype: int, payload: bytes) -> bytes:
    """An Ethernet II frame, padded with zeros to the minimum."""
    frame = struct.pack("!6s6sH", destination, source, ethertype) + payload
    return frame.ljust(FRAME_BYTES_MIN, b"\x00")


def tagged(frame: bytes, vlan_id: int, ethertype: int = ETHERTYPE_VLAN) -> bytes:
    """The frame with a VLAN tag of priority 0 (IEEE 802.1Q, or 802.1ad with 0x88a8)."""
    return frame[:12] + struct.pack("!HH", ethertype, vlan_id) + frame[12:]


def icmpv6_checksum(
    source: ipaddress.IPv6Address, destination: ipaddress.IPv6Address, message: bytes
) -> int:
    """RFC 4443 section 2.3: over the pseudo-header of RFC 8200 section 8.1 and the message."""
    pseudo = struct.pack("!16s16sI3xB", source.packed, destination.packed, len(message), _ICMPV6)
    data = pseudo + message + (b"\x00" if len(message) % 2 else b"")
    total = sum(_words(data))
    while total > 0xFFFF:
        total = (total & 0xFFFF) + (total >> 16)
    return total ^ 0xFFFF


def _words(data: bytes) -> Sequence[int]:
    return struct.unpack(f"!{len(data) // 2}H", data)


def _arp(
    operation: int,
    sender_mac: bytes,
    sender_address: bytes,
    target_mac: bytes,
    target_address: bytes,
) -> bytes:
    """RFC 826: hardware type 1 (Ethernet), protocol type IPv4, lengths 6 and 4."""
    return struct.pack(
        "!HHBBH6s4s6s4s",
        1,
        0x0800,
        6,
        4,
        operation,
        sender_mac,
        sender_address,
        target_mac,
        target_address,
    )
