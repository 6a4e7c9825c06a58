"""The addresses that a guest uses, as its own tap tells them.

    ARP            the sender of what the guest asks or says (RFC 826)
    ND             the target of an advertisement, or of a question whether it is free (RFC 4862);
                   the source of any other question
    DHCP, DHCPv6   what a server has just given it (RFC 2131, RFC 8415)

A filter in the kernel passes these frames alone, so a busy guest costs nothing. A NIC keeps its
latest few addresses: what a guest gave up is forgotten when it has taken as many others. A guest
that sends nothing but these, as fast as it can, is listened to now and then, and not logged.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import socket
import struct
from collections.abc import Iterable, Iterator
from typing import Final

from migrator.errors import FabricError
from netfabric import capture
from netfabric.capture import Instruction
from netfabric.frames import ETHERTYPE_ARP, ETHERTYPE_IPV6
from netfabric.threads import in_thread

ADDRESSES_MAX: Final = 16
"""That are kept of one NIC."""
FRAMES_A_TURN: Final = 32
"""That are read before others get their turn in the event loop."""
PAUSE_S: Final = 0.05
"""Then nothing is read for so long. What the socket can't keep meanwhile is dropped."""

_log = logging.getLogger(__name__)
_ETHERTYPE_IPV4: Final = 0x0800
_LDH: Final = 0x28
_LDB: Final = 0x30
_LDH_INDIRECT: Final = 0x48
_LDX_HEADER_LENGTH: Final = 0xB1
_JEQ: Final = 0x15
_JSET: Final = 0x45
_RET: Final = 0x06
_DHCP_COOKIE: Final = b"\x63\x82\x53\x63"
_DHCP_ACK: Final = 5
_DHCPV6_REPLY: Final = 7
_IA_NA: Final = 3
_IAADDR: Final = 5
_SOLICITATION: Final = 135
_ADVERTISEMENT: Final = 136


def _assembled() -> tuple[Instruction, ...]:
    """The filter, its jumps computed from labels."""
    lines: list[tuple[str, int, str, str, int]] = [
        ("", _LDH, "", "", 12),
        ("", _JEQ, "take", "", ETHERTYPE_ARP),
        ("", _JEQ, "six", "", ETHERTYPE_IPV6),
        ("", _JEQ, "", "drop", _ETHERTYPE_IPV4),
        ("", _LDB, "", "", 23),
        ("", _JEQ, "", "drop", socket.IPPROTO_UDP),
        ("", _LDH, "", "", 20),
        ("", _JSET, "drop", "", 0x1FFF),
        ("", _LDX_HEADER_LENGTH, "", "", 14),
        ("", _LDH_INDIRECT, "", "", 16),
        ("", _JEQ, "take", "drop", 68),
        ("six", _LDB, "", "", 20),
        ("", _JEQ, "", "udp6", 58),
        ("", _LDB, "", "", 54),
        ("", _JEQ, "take", "", _SOLICITATION),
        ("", _JEQ, "take", "drop", _ADVERTISEMENT),
        ("udp6", _JEQ, "", "drop", socket.IPPROTO_UDP),
        ("", _LDH, "", "", 56),
        ("", _JEQ, "take", "drop", 546),
        ("take", _RET, "", "", capture.WHOLE_FRAME),
        ("drop", _RET, "", "", 0),
    ]
    places = {line[0]: number for number, line in enumerate(lines) if line[0]}

    def jump(label: str, number: int) -> int:
        return places[label] - number - 1 if label else 0

    return tuple(
        (code, jump(yes, number), jump(no, number), value)
        for number, (_, code, yes, no, value) in enumerate(lines)
    )


PROGRAM: Final = _assembled()


def addresses_in(frame: bytes, mac: bytes, *, to_guest: bool) -> set[str]:
    """The guest's addresses that one frame of its tap tells; none for what is cut short. Pure."""
    with contextlib.suppress(struct.error, ValueError, IndexError):
        return {text for text in _told(frame, mac, to_guest) if _is_owned(text)}
    return set()


def _told(frame: bytes, mac: bytes, to_guest: bool) -> Iterator[str]:
    (ethertype,) = struct.unpack_from("!H", frame, 12)
    if ethertype == ETHERTYPE_ARP and not to_guest:
        if frame[22:28] == mac:
            yield str(ipaddress.IPv4Address(frame[28:32]))
    elif ethertype == _ETHERTYPE_IPV4 and to_guest:
        yield from _from_dhcp(frame[14 + 4 * (frame[14] & 0xF) + 8 :], mac)
    elif ethertype == ETHERTYPE_IPV6 and frame[20] == 58 and not to_guest:
        if frame[6:12] == mac:
            yield from _from_discovery(frame)
    elif ethertype == ETHERTYPE_IPV6 and to_guest:
        is_reply = frame[20] == socket.IPPROTO_UDP and frame[62] == _DHCPV6_REPLY
        if is_reply and frame[:6] == mac:
            for kind, value in _options_in(frame[66:]):
                yield from _from_association(value) if kind == _IA_NA else ()


def _from_discovery(frame: bytes) -> Iterator[str]:
    source, target = (ipaddress.IPv6Address(frame[at : at + 16]) for at in (22, 62))
    if frame[54] == _ADVERTISEMENT or source.is_unspecified:
        yield str(target)
    else:
        yield str(source)


def _from_dhcp(message: bytes, mac: bytes) -> Iterator[str]:
    if message[0] != 2 or message[28:34] != mac or message[236:240] != _DHCP_COOKIE:
        return
    at = 240
    while message[at] != 255:
        kind, length = message[at], message[at + 1]
        if kind == 0:
            at += 1
            continue
        if (kind, message[at + 2]) == (53, _DHCP_ACK):
            yield str(ipaddress.IPv4Address(message[16:20]))
        at += 2 + length


def _from_association(value: bytes) -> Iterator[str]:
    """DHCPv6: what an IA_NA holds."""
    for kind, address in _options_in(value[12:]):
        if kind == _IAADDR:
            yield str(ipaddress.IPv6Address(address[:16]))


def _options_in(options: bytes) -> Iterator[tuple[int, bytes]]:
    """DHCPv6: code and content of each."""
    at = 0
    while at + 4 <= len(options):
        kind, length = struct.unpack_from("!HH", options, at)
        yield kind, options[at + 4 : at + 4 + length]
        at += 4 + length


def _is_owned(text: str) -> bool:
    address = ipaddress.ip_address(text)
    return not (address.is_unspecified or address.is_multicast or address.is_loopback)


class AddressWatcher:
    """Watches taps. Belongs to one event loop; `close` ends it all."""

    def __init__(self, *, outgoing_to_guest: bool = True) -> None:
        """`outgoing_to_guest`: what leaves by the interface goes to the guest: a tap's does."""
        self._outgoing_to_guest = outgoing_to_guest
        self._sockets: dict[str, socket.socket] = {}
        self._learnt: dict[str, dict[str, None]] = {}
        self._defined: dict[str, tuple[str, ...]] = {}

    def watch(self, tap: str, mac: bytes, defined: tuple[str, ...] = ()) -> None:
        """From now on, in place of an earlier watch of that tap. FabricError: it can't be.

        `defined`: addresses that it has by definition.
        """
        self._defined[tap] = defined
        earlier = self._stop(tap)
        if earlier is not None:  # Of a tap of that name which is gone.
            _close_aside(earlier)
        self._learnt[tap] = {}
        opened = capture.open_capture(tap, PROGRAM)
        self._sockets[tap] = opened
        asyncio.get_running_loop().add_reader(opened, self._take, tap, opened, mac)

    def add(self, tap: str, texts: Iterable[str]) -> None:
        """What another node has learnt of the guest."""
        for text in texts:
            self._note(tap, text)

    def learnt(self, tap: str) -> tuple[str, ...]:
        """What was learnt of a tap so far, the oldest first."""
        return tuple(self._learnt.get(tap, ()))

    def known(self) -> frozenset[str]:
        """The addresses of every tap, defined or learnt."""
        every = (*self._defined.values(), *self._learnt.values())
        return frozenset(text for texts in every for text in texts)

    async def forget(self, tap: str) -> None:
        """End the watch. Idempotent."""
        self._defined.pop(tap, None)
        self._learnt.pop(tap, None)
        opened = self._stop(tap)
        if opened is not None:
            await in_thread(opened.close)

    async def close(self) -> None:
        for tap in list(self._sockets):
            await self.forget(tap)

    def _stop(self, tap: str) -> socket.socket | None:
        opened = self._sockets.pop(tap, None)
        if opened is not None:
            asyncio.get_running_loop().remove_reader(opened)
        return opened

    def _take(self, tap: str, opened: socket.socket, mac: bytes) -> None:
        for _ in range(FRAMES_A_TURN):
            try:
                received = capture.receive(opened)
            except FabricError:  # The tap is gone; `forget` does the rest.
                self._stop(tap)
                _close_aside(opened)
                return
            if received is None:
                return
            frame, outgoing, _ = received
            to_guest = outgoing is self._outgoing_to_guest
            for text in addresses_in(frame, mac, to_guest=to_guest):
                self._note(tap, text)
        loop = asyncio.get_running_loop()
        loop.remove_reader(opened)
        loop.call_later(PAUSE_S, self._go_on, tap, opened, mac)

    def _go_on(self, tap: str, opened: socket.socket, mac: bytes) -> None:
        if self._sockets.get(tap) is opened:
            asyncio.get_running_loop().add_reader(opened, self._take, tap, opened, mac)

    def _note(self, tap: str, text: str) -> None:
        learnt = self._learnt.setdefault(tap, {})
        if text not in learnt and len(learnt) < ADDRESSES_MAX:  # Else it has taken many already.
            _log.info("the guest behind %s uses %s", tap, text)
        learnt.pop(text, None)
        learnt[text] = None
        while len(learnt) > ADDRESSES_MAX:
            del learnt[next(iter(learnt))]


def _close_aside(opened: socket.socket) -> None:
    """Closing waits until no packet is under way to it: some ms, for which a guest may wait."""
    asyncio.get_running_loop().run_in_executor(None, opened.close)
