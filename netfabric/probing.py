"""Asking the network for a NIC: does what is sent to its MAC find it?

    node ── uplink ── switches ── wherever they think that the MAC is ── guest
         ARP probe or neighbour solicitation, to the NIC's own MAC ──►
         ◄── the guest's answer, to a MAC that only probes use

The question is sent to the NIC's MAC and not to everybody: a switch whose table is stale sends it
to the NIC's old place, and it isn't answered. The old node proves most: a switch that still
believes that the NIC is there never sends the question back to where it came from.

While it waits, the node also notes what kinds of frames of the NIC reach it: an announcement that
nobody hears, or that is heard while questions aren't answered, tells what is wrong (`suspects`).

Synchronous; belongs into a thread.
"""

from __future__ import annotations

import contextlib
import ipaddress
import socket
import struct
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

from migrator.errors import FabricError
from migrator.model import NicSpec
from migrator.ports import ProbeReport
from netfabric import capture
from netfabric.exits import Exit
from netfabric.frames import (
    ETHERTYPE_ARP,
    ETHERTYPE_IPV6,
    ETHERTYPE_RARP,
    arp_probe,
    neighbour_solicitation,
    parse_address,
    parse_mac,
    tagged,
)

_KINDS: Final = {
    ETHERTYPE_ARP: "arp",
    ETHERTYPE_RARP: "rarp",
    0x0800: "ipv4",
    ETHERTYPE_IPV6: "ipv6",
}
_TAGS: Final = (0x8100, 0x88A8)
_ARP_REPLY: Final = 2
_ICMPV6: Final = 58
_NEIGHBOUR_ADVERTISEMENT: Final = 136


@dataclass(slots=True)
class _Findings:
    answered: set[str] = field(default_factory=set)
    heard: set[str] = field(default_factory=set)


def probing_mac(uplink_mac: str) -> bytes:
    """The MAC that a node's questions come from: its uplink's with another first byte."""
    return bytes([0x06]) + bytes.fromhex(uplink_mac.replace(":", ""))[1:]


def probe(
    nic: NicSpec, uplinks: Sequence[Exit], own_mac: bytes, timeout_s: float, learnt_at: str = ""
) -> ProbeReport:
    """Ask by every uplink; returns when each address has answered, or after `timeout_s`.

    A NIC without addresses can only be heard: then it returns with its first frame.
    """
    mac = parse_mac(nic.mac)
    questions = {str(parse_address(text)): question(own_mac, mac, text) for text in nic.addresses}
    findings = _Findings()
    failures: list[str] = []
    with contextlib.ExitStack() as stack:
        sockets: list[socket.socket] = []
        for way in uplinks:
            try:
                program = capture.in_vlan(way, capture.from_mac(mac))
                opened = capture.open_capture(way.port, program, promiscuous=way.addressed)
                sockets.append(stack.enter_context(opened))
                _ask(opened, way, questions.values())
            except (OSError, FabricError) as error:
                failures.append(f"{way.port}: {error}")
        deadline = time.monotonic() + timeout_s
        for ready in capture.ready_until(sockets, deadline):
            _take(ready, own_mac, findings)
            if _complete(questions, findings):
                break
    return ProbeReport(
        able=bool(sockets),
        answered=tuple(sorted(findings.answered & questions.keys())),
        heard=tuple(sorted(findings.heard)),
        learnt_at=learnt_at,
        detail="; ".join(failures),
    )


def question(own_mac: bytes, mac: bytes, address_text: str) -> bytes:
    """The frame that asks one MAC for one address. FabricError for what is no address."""
    address = parse_address(address_text)
    if isinstance(address, ipaddress.IPv4Address):
        return arp_probe(own_mac, mac, address)
    return neighbour_solicitation(own_mac, mac, address)


def answer(frame: bytes, own_mac: bytes) -> str | None:
    """The address that a frame to `own_mac` says is its sender's; None if it says no such thing."""
    ethertype, payload = dissect(frame)
    if frame[:6] != own_mac:
        return None
    if ethertype == ETHERTYPE_ARP and len(payload) >= 28:
        operation = int.from_bytes(payload[6:8], "big")
        return str(ipaddress.IPv4Address(payload[14:18])) if operation == _ARP_REPLY else None
    if ethertype == ETHERTYPE_IPV6 and len(payload) >= 64 and payload[6] == _ICMPV6:
        advertised = payload[40] == _NEIGHBOUR_ADVERTISEMENT
        return str(ipaddress.IPv6Address(payload[48:64])) if advertised else None
    return None


def kind_of(frame: bytes) -> str:
    """arp, rarp, ipv4, ipv6 or other."""
    return _KINDS.get(dissect(frame)[0], "other")


def dissect(frame: bytes) -> tuple[int, bytes]:
    """The EtherType and what follows it, past one VLAN tag."""
    (ethertype,) = struct.unpack_from("!H", frame, 12)
    if ethertype in _TAGS:
        return struct.unpack_from("!H", frame, 16)[0], frame[18:]
    return ethertype, frame[14:]


def _complete(questions: dict[str, bytes], findings: _Findings) -> bool:
    return findings.answered >= questions.keys() if questions else bool(findings.heard)


def _ask(opened: socket.socket, way: Exit, questions: Iterable[bytes]) -> None:
    for frame in questions:
        if way.vlan_id is not None:
            frame = tagged(frame, way.vlan_id, way.vlan_ethertype)  # noqa: PLW2901
        opened.send(frame)


def _take(ready: socket.socket, own_mac: bytes, findings: _Findings) -> None:
    for frame, outgoing, _ in capture.received(ready):
        if outgoing or len(frame) < 14:
            continue
        findings.heard.add(kind_of(frame))
        found = answer(frame, own_mac)
        if found is not None:
            findings.answered.add(found)
