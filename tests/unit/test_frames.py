"""Announcement frames: byte for byte, and as an independent implementation reads them."""

from __future__ import annotations

import ipaddress

import pytest

from migrator.errors import FabricError
from migrator.model import NicSpec
from netfabric import frames
from netfabric.checks import mtu_reason, nic_reasons

MAC = bytes.fromhex("525400aabbcc")
V4 = ipaddress.IPv4Address("10.1.2.3")
V6 = ipaddress.IPv6Address("2001:db8::5")


def test_gratuitous_arp_request() -> None:
    expected = bytes.fromhex(
        "ffffffffffff 525400aabbcc 0806"  # Ethernet: to all, from the guest, ARP
        "0001 0800 06 04 0001"  # Ethernet, IPv4, lengths, request
        "525400aabbcc 0a010203"  # sender
        "000000000000 0a010203"  # target: unknown MAC, the sender's own address
    )
    assert frames.gratuitous_arp_request(MAC, V4) == expected + bytes(18)


def test_gratuitous_arp_reply() -> None:
    expected = bytes.fromhex(
        "ffffffffffff 525400aabbcc 0806"
        "0001 0800 06 04 0002"
        "525400aabbcc 0a010203"
        "525400aabbcc 0a010203"
    )
    assert frames.gratuitous_arp_reply(MAC, V4) == expected + bytes(18)


def test_rarp() -> None:
    expected = bytes.fromhex(
        "ffffffffffff 525400aabbcc 8035"
        "0001 0800 06 04 0003"
        "525400aabbcc 00000000"
        "525400aabbcc 00000000"
    )
    assert frames.rarp(MAC) == expected + bytes(18)


def test_neighbour_advertisement() -> None:
    expected = bytes.fromhex(
        "333300000001 525400aabbcc 86dd"
        "60000000 0020 3a ff"  # version 6, 32 bytes of ICMPv6, hop limit 255
        "20010db8000000000000000000000005"
        "ff020000000000000000000000000001"
        "88 00 ec58 20000000"  # advertisement, checksum, Override
        "20010db8000000000000000000000005"  # target
        "02 01 525400aabbcc"  # option: the target's link-layer address, 8 bytes
    )
    assert frames.neighbour_advertisement(MAC, V6) == expected


def test_neighbour_advertisement_of_a_router_says_so() -> None:
    frame = frames.neighbour_advertisement(MAC, V6, router=True)
    assert frame[58:62] == bytes.fromhex("a0000000")


def test_vlan_tag() -> None:
    frame = frames.rarp(MAC)
    assert frames.tagged(frame, 42) == frame[:12] + bytes.fromhex("8100 002a") + frame[12:]
    assert frames.tagged(frame, 42, 0x88A8)[12:16] == bytes.fromhex("88a8 002a")


def test_one_round_covers_every_address() -> None:
    nic = NicSpec(mac="52:54:00:aa:bb:cc", bridge="br0", addresses=("10.1.2.3", "2001:db8::5"))
    assert frames.announcements(nic) == (
        frames.gratuitous_arp_request(MAC, V4),
        frames.gratuitous_arp_reply(MAC, V4),
        frames.neighbour_advertisement(MAC, V6),
    )


def test_a_nic_without_addresses_is_announced_by_rarp() -> None:
    nic = NicSpec(mac="52:54:00:aa:bb:cc", bridge="br0")
    assert frames.announcements(nic) == (frames.rarp(MAC),)


@pytest.mark.parametrize("mac", ["01:00:5e:00:00:01", "ff:ff:ff:ff:ff:ff", "00:00:00:00:00:00"])
def test_a_mac_that_no_nic_can_have_is_refused(mac: str) -> None:
    with pytest.raises(FabricError):
        frames.parse_mac(mac)
    assert nic_reasons(NicSpec(mac=mac, bridge="br0"))


@pytest.mark.parametrize("mac", ["", "52:54:00", "zz:54:00:aa:bb:cc"])
def test_what_is_not_a_mac_is_refused(mac: str) -> None:
    with pytest.raises(FabricError):
        frames.parse_mac(mac)


@pytest.mark.parametrize(
    "address",
    [
        "224.0.0.1",
        "ff02::1",
        "0.0.0.0",
        "::",
        "127.0.0.1",
        "::1",
        "255.255.255.255",
        "10.0.0.1/24",
        "fe80::1%e0",
        "web",
    ],
)
def test_an_address_that_no_guest_owns_is_refused(address: str) -> None:
    with pytest.raises(FabricError):
        frames.parse_address(address)
    nic = NicSpec(mac="52:54:00:aa:bb:cc", bridge="br0", addresses=(address,))
    assert len(nic_reasons(nic)) == 1


def test_the_bridge_must_be_as_wide_as_the_nic() -> None:
    nic = NicSpec(mac="52:54:00:aa:bb:cc", bridge="br0", mtu_bytes=9000)
    assert mtu_reason(nic, 9000) is None
    assert "9000" in (mtu_reason(nic, 1500) or "")


class TestAgainstScapy:
    """Scapy builds and reads the same frames by code of its own."""

    def test_arp(self) -> None:
        from scapy.layers.l2 import ARP, Ether

        for op, target, frame in (
            ("who-has", "00:00:00:00:00:00", frames.gratuitous_arp_request(MAC, V4)),
            ("is-at", "52:54:00:aa:bb:cc", frames.gratuitous_arp_reply(MAC, V4)),
        ):
            ether = Ether(src="52:54:00:aa:bb:cc", dst="ff:ff:ff:ff:ff:ff")
            arp = ARP(op=op, hwsrc=ether.src, hwdst=target, psrc=str(V4), pdst=str(V4))
            assert bytes(ether / arp).ljust(60, b"\x00") == frame

    def test_rarp(self) -> None:
        from scapy.layers.l2 import Ether

        packet = Ether(frames.rarp(MAC))
        assert (packet.type, packet.src) == (0x8035, "52:54:00:aa:bb:cc")

    @pytest.mark.parametrize("address", ["2001:db8::5", "fe80::5054:ff:feaa:bbcc", "fd00::ffff"])
    @pytest.mark.parametrize("router", [False, True])
    def test_neighbour_advertisement(self, address: str, router: bool) -> None:
        from scapy.layers.inet6 import ICMPv6ND_NA, ICMPv6NDOptDstLLAddr, IPv6
        from scapy.layers.l2 import Ether

        packet = (
            Ether(src="52:54:00:aa:bb:cc", dst="33:33:00:00:00:01")
            / IPv6(src=address, dst="ff02::1", hlim=255)
            / ICMPv6ND_NA(tgt=address, R=int(router), S=0, O=1)
            / ICMPv6NDOptDstLLAddr(lladdr="52:54:00:aa:bb:cc")
        )
        frame = frames.neighbour_advertisement(MAC, ipaddress.IPv6Address(address), router=router)
        assert bytes(packet) == frame
