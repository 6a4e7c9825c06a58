"""Which addresses a guest's own frames tell, made by an implementation that nobody here wrote."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import logging
import random
import socket
import struct
from collections.abc import Callable
from typing import Any

import pytest
from scapy.layers.dhcp import BOOTP, DHCP
from scapy.layers.dhcp6 import DHCP6_Reply, DHCP6OptIA_NA, DHCP6OptIAAddress, DHCP6OptServerId
from scapy.layers.inet import IP, UDP
from scapy.layers.inet6 import ICMPv6ND_NA, ICMPv6ND_NS, IPv6
from scapy.layers.l2 import ARP, Ether
from scapy.packet import Packet

from netfabric import capture
from netfabric.addresses import ADDRESSES_MAX, FRAMES_A_TURN, AddressWatcher, addresses_in

MAC, OTHER = "52:54:00:aa:bb:cc", "52:54:00:aa:bb:dd"
RAW = bytes.fromhex(MAC.replace(":", ""))


def dhcp(kind: str, mac: str = MAC) -> Packet:
    hardware = bytes.fromhex(mac.replace(":", ""))
    return (
        IP(src="10.0.0.1", dst="255.255.255.255")
        / UDP(sport=67, dport=68)
        / BOOTP(op=2, yiaddr="10.0.0.7", chaddr=hardware + bytes(10))
        / DHCP(options=[("lease_time", 60), ("message-type", kind), "end"])
    )


def dhcp6() -> Packet:
    given = DHCP6OptIAAddress(addr="2001:db8::7")
    return (
        IPv6(src="fe80::1", dst="fe80::2")
        / UDP(sport=547, dport=546)
        / DHCP6_Reply()
        / DHCP6OptServerId()
        / DHCP6OptIA_NA(ianaopts=[given])
    )


FROM_GUEST = [
    (ARP(op=1, hwsrc=MAC, psrc="10.0.0.5", pdst="10.0.0.1"), {"10.0.0.5"}),
    (ARP(op=2, hwsrc=MAC, psrc="10.0.0.5", pdst="10.0.0.1"), {"10.0.0.5"}),
    (ARP(op=1, hwsrc=MAC, psrc="0.0.0.0", pdst="10.0.0.5"), set()),
    (ARP(op=1, hwsrc=OTHER, psrc="10.0.0.6", pdst="10.0.0.1"), set()),
    (IPv6(src="2001:db8::5") / ICMPv6ND_NA(tgt="2001:db8::5"), {"2001:db8::5"}),
    (IPv6(src="::", dst="ff02::1:ff00:5") / ICMPv6ND_NS(tgt="2001:db8::5"), {"2001:db8::5"}),
    (IPv6(src="fe80::5", dst="ff02::1:ff00:1") / ICMPv6ND_NS(tgt="fe80::1"), {"fe80::5"}),
    (dhcp("ack"), set()),
]
TO_GUEST = [
    (dhcp("ack"), {"10.0.0.7"}),
    (dhcp("offer"), set()),
    (dhcp("ack", OTHER), set()),
    (dhcp6(), {"2001:db8::7"}),
    (ARP(op=2, hwsrc=OTHER, psrc="10.0.0.1", pdst="10.0.0.5"), set()),
    (IPv6(src="2001:db8::1") / ICMPv6ND_NA(tgt="2001:db8::1"), set()),
]


@pytest.mark.parametrize(("body", "expected"), FROM_GUEST)
def test_what_a_guest_says(body: Packet, expected: set[str]) -> None:
    frame = (Ether(src=MAC, dst="ff:ff:ff:ff:ff:ff") / body).build()
    assert addresses_in(frame, RAW, to_guest=False) == expected


@pytest.mark.parametrize(("body", "expected"), TO_GUEST)
def test_what_a_guest_is_told(body: Packet, expected: set[str]) -> None:
    frame = (Ether(src=OTHER, dst=MAC) / body).build()
    assert addresses_in(frame, RAW, to_guest=True) == expected


def test_what_is_cut_short_or_nonsense_tells_nothing_and_harms_nobody() -> None:
    rng = random.Random(1)
    whole = [(Ether(src=MAC, dst=MAC) / body).build() for body, _ in (*FROM_GUEST, *TO_GUEST)]
    for frame in whole:
        for length in range(len(frame)):
            for to_guest in (False, True):
                found = addresses_in(frame[:length], RAW, to_guest=to_guest)
                assert len(found) <= 1
    for _ in range(2000):
        damaged = bytearray(rng.choice(whole))
        for _ in range(rng.randrange(1, 8)):
            damaged[rng.randrange(12, len(damaged))] = rng.randrange(256)
        addresses_in(bytes(damaged), RAW, to_guest=rng.random() < 0.5)


def test_options_within_options_without_end_are_no_recursion_without_end() -> None:
    nested = b""
    while len(nested) < 60_000:  # An MTU may be 65,521 bytes.
        nested = struct.pack("!HH12x", 3, 12 + len(nested)) + nested
    reply = IPv6(src="fe80::1", dst="fe80::2") / UDP(sport=547, dport=546) / DHCP6_Reply()
    frame = (Ether(src=OTHER, dst=MAC) / reply).build() + nested
    assert addresses_in(frame, RAW, to_guest=True) == set()


# --- a guest that floods ---------------------------------------------------------------------


def arp_from(number: int) -> bytes:
    said = ARP(op=1, hwsrc=MAC, psrc=f"10.0.0.{1 + number}", pdst="10.0.0.1")
    return (Ether(src=MAC, dst="ff:ff:ff:ff:ff:ff") / said).build()


async def test_a_guest_that_floods_is_neither_logged_nor_listened_to_without_end(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    waiting = collections.deque(arp_from(number) for number in range(3 * FRAMES_A_TURN))
    guest, watched = socket.socketpair()
    watched.setblocking(False)
    guest.send(b"There is something to read.")

    def receive(opened: socket.socket) -> tuple[bytes, bool, float] | None:
        if waiting:
            return waiting.popleft(), False, 0.0
        with contextlib.suppress(BlockingIOError):
            opened.recv(100)
        return None

    pauses: asyncio.Queue[Callable[[], None]] = asyncio.Queue()
    go_on = AddressWatcher._go_on

    def has_paused(watcher: AddressWatcher, *watched: Any) -> None:
        pauses.put_nowait(lambda: go_on(watcher, *watched))

    monkeypatch.setattr(capture, "open_capture", lambda *_: watched)
    monkeypatch.setattr(capture, "receive", receive)
    monkeypatch.setattr(AddressWatcher, "_go_on", has_paused)
    caplog.set_level(logging.INFO, "netfabric.addresses")
    watcher = AddressWatcher(outgoing_to_guest=True)
    with guest, watched:
        watcher.watch("fy", RAW)
        async with asyncio.timeout(30):
            for turns in (1, 2, 3):
                ends = await pauses.get()
                assert len(waiting) == (3 - turns) * FRAMES_A_TURN, "it isn't read in a pause"
                ends()
        assert not waiting
        assert len(watcher.learnt("fy")) == ADDRESSES_MAX
        assert len(caplog.records) == ADDRESSES_MAX
        await watcher.close()
