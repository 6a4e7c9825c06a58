"""Questions to a NIC, as another implementation reads them, and what counts as an answer."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import resource
import socket
import time
from collections.abc import Iterator

import pytest
from scapy.layers.inet6 import ICMPv6ND_NA, ICMPv6ND_NS, ICMPv6NDOptDstLLAddr, IPv6
from scapy.layers.l2 import ARP, Dot1Q, Ether

from migrator.model import NicSpec
from netfabric import capture, frames
from netfabric.exits import Exit
from netfabric.probing import answer, kind_of, probe, probing_mac, question
from netfabric.routed.probing import _take_widths
from netfabric.wide_frames import SHORT_BYTES, frame_of, hear

GUEST = bytes.fromhex("525400aabbcc")
OWN = bytes.fromhex("0611223344ff")


def test_an_arp_probe_is_addressed_to_one_mac_and_names_no_sender() -> None:
    packet = Ether(question(OWN, GUEST, "10.1.2.3"))
    assert (packet.dst, packet.src) == ("52:54:00:aa:bb:cc", "06:11:22:33:44:ff")
    arp = packet[ARP]
    assert (arp.op, arp.psrc, arp.pdst) == (1, "0.0.0.0", "10.1.2.3")
    assert (arp.hwsrc, arp.hwdst) == ("06:11:22:33:44:ff", "00:00:00:00:00:00")


def test_a_neighbour_solicitation_is_whole() -> None:
    frame = question(OWN, GUEST, "2001:db8::5")
    packet = Ether(frame)
    assert packet.dst == "52:54:00:aa:bb:cc"
    ip, solicitation = packet[IPv6], packet[ICMPv6ND_NS]
    assert (ip.src, ip.dst, ip.hlim) == ("fe80::411:22ff:fe33:44ff", "2001:db8::5", 255)
    assert solicitation.tgt == "2001:db8::5"
    assert solicitation.lladdr == "06:11:22:33:44:ff"
    checksum = solicitation.cksum
    del packet[ICMPv6ND_NS].cksum
    assert Ether(packet.build())[ICMPv6ND_NS].cksum == checksum


@pytest.mark.parametrize("tagged", [False, True])
def test_answers(tagged: bool) -> None:
    ethernet = Ether(src="52:54:00:aa:bb:cc", dst="06:11:22:33:44:ff")
    head = ethernet / Dot1Q(vlan=7) if tagged else ethernet
    reply = head / ARP(op=2, psrc="10.1.2.3", pdst="0.0.0.0", hwsrc="52:54:00:aa:bb:cc")
    advertisement = (
        head
        / IPv6(src="2001:db8::5", dst="fe80::1")
        / ICMPv6ND_NA(tgt="2001:db8::5")
        / ICMPv6NDOptDstLLAddr(lladdr="52:54:00:aa:bb:cc")
    )
    assert answer(reply.build(), OWN) == "10.1.2.3"
    assert answer(advertisement.build(), OWN) == "2001:db8::5"
    assert (kind_of(reply.build()), kind_of(advertisement.build())) == ("arp", "ipv6")


def test_what_is_no_answer() -> None:
    announcement = frames.gratuitous_arp_reply(GUEST, ipaddress.IPv4Address("10.1.2.3"))
    assert answer(announcement, OWN) is None, "it isn't to us"
    request = Ether(src="52:54:00:aa:bb:cc", dst="06:11:22:33:44:ff") / ARP(op=1, psrc="10.1.2.3")
    assert answer(request.build(), OWN) is None
    assert answer(OWN + GUEST + b"\x08\x06", OWN) is None, "cut short"
    assert kind_of(frames.rarp(GUEST)) == "rarp"


def test_questions_come_from_a_mac_that_no_port_has() -> None:
    assert probing_mac("52:54:00:00:00:01").hex(":") == "06:54:00:00:00:01"


# --- many descriptors, many frames -----------------------------------------------------------

NIC = NicSpec(mac="52:54:00:aa:bb:cc", bridge="br0", addresses=("10.1.2.3",))
UPLINK = [Exit("eth0")]


@pytest.fixture
def uplink(monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """The network's end of what stands in for an uplink."""
    network, ours = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)

    def open_capture(*_: object, **__: object) -> socket.socket:
        opened = ours.dup()
        opened.setblocking(False)
        return opened

    def receive(opened: socket.socket) -> tuple[bytes, bool, float] | None:
        try:
            return opened.recv(2048), False, 0.0
        except BlockingIOError:
            return None

    monkeypatch.setattr(capture, "open_capture", open_capture)
    monkeypatch.setattr(capture, "receive", receive)
    with network, ours:
        yield network


@pytest.fixture
def many_descriptors() -> Iterator[None]:
    """As an agent of some hundred guests has them."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 1200
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, max(hard, wanted)))
    try:
        with contextlib.ExitStack() as stack:
            while (opened := os.open(os.devnull, os.O_RDONLY)) <= 1024:
                stack.callback(os.close, opened)
            os.close(opened)
            yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.usefixtures("many_descriptors")
def test_descriptors_above_1023_can_be_listened_to(uplink: socket.socket) -> None:
    assert uplink.fileno() > 1023
    assert probe(NIC, UPLINK, OWN, 0.02).able
    assert not hear(UPLINK, bytes(8), 1500, 0.02).full


def test_a_guest_that_sends_faster_than_anybody_reads_is_not_listened_to_for_ever(
    uplink: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is on its way to somebody at the node that asks, say."""
    frame = (Ether(src=NIC.mac, dst="06:11:22:33:44:00") / ARP(op=1)).build()
    until = time.monotonic() + 5
    uplink.send(frame)

    def flood(_: socket.socket) -> tuple[bytes, bool, float] | None:
        assert time.monotonic() < until, "the time wasn't looked at"
        return frame, False, 0.0

    monkeypatch.setattr(capture, "receive", flood)
    report = probe(NIC, UPLINK, OWN, 0.05)
    assert (report.able, report.answered, report.heard) == (True, (), ("arp",))


# --- a thread that comes late --------------------------------------------------------------------


def test_answers_that_came_in_time_count_however_late_they_are_read(uplink: socket.socket) -> None:
    """A busy node took its own lateness for others' silence."""
    head = Ether(src=NIC.mac, dst="06:11:22:33:44:ff")
    uplink.send((head / ARP(op=2, psrc="10.1.2.3", pdst="0.0.0.0", hwsrc=NIC.mac)).build())
    assert probe(NIC, UPLINK, OWN, 0.0).answered == ("10.1.2.3",)
    token = b"12345678"
    for length in (SHORT_BYTES, 1500):
        uplink.send(frame_of(OWN, token, length))
    assert hear(UPLINK, token, 1500, 0.0).full


def test_a_wide_answer_behind_a_short_one_counts_however_late_it_is_read() -> None:
    """Else the routers were taken for narrow ones, and a domain didn't move."""
    hop, token, full_bytes = ipaddress.ip_address("127.0.0.1"), b"12345678", 1472
    answered, wanted = set[tuple[int, bool]](), {(4, False), (4, True)}
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as opened,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as router,
    ):
        opened.setblocking(False)
        for each in (opened, router):
            each.bind((str(hop), 0))
        for length in (len(token), full_bytes):
            message = bytes(8) + token.ljust(length, b"\0")  # An echo's reply begins with 0.
            router.sendto(b"\x45" + bytes(19) + message, opened.getsockname())
        _take_widths({opened: (hop, full_bytes)}, token, time.monotonic(), answered, wanted)
    assert answered == wanted
