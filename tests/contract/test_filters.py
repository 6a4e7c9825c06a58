"""What a guest may send by its tap, and how much, as the kernel's rules have it."""

from __future__ import annotations

import asyncio
import ipaddress
import os
import time
from collections.abc import Awaitable, Callable

import pytest
from scapy.layers.dhcp import BOOTP
from scapy.layers.inet import IP, UDP
from scapy.layers.l2 import ARP, Dot1Q, Ether

from migrator.errors import FabricError
from migrator.model import DomainName, NicSpec
from netfabric import filters
from netfabric.bridge import BridgeFabric
from netfabric.frames import (
    ethernet,
    gratuitous_arp_reply,
    neighbour_advertisement,
    parse_mac,
    rarp,
)
from netfabric.taps import VNET_HEADER_BYTES, tap_name
from tests.contract.fabric_worlds import BridgeWorld, eventually, run_bridge, run_macvtap

WEB = DomainName("web")
MAC, OTHER = "52:54:00:aa:bb:cc", "52:54:00:aa:bb:dd"
NIC = NicSpec(mac=MAC, bridge="br0", addresses=("10.0.0.5", "2001:db8::5"), anti_spoofing=True)
OWN, FOREIGN = ipaddress.IPv4Address("10.0.0.5"), ipaddress.IPv4Address("10.0.0.6")
LAST = 0x88B6


def send(tap: int, frame: bytes) -> None:
    """As the guest does."""
    os.write(tap, bytes(VNET_HEADER_BYTES) + frame)


async def passed(world: BridgeWorld, tap: int, frame: bytes) -> bool:
    """Whether the network hears this frame of the guest's."""
    seen = len(world.frames)
    send(tap, frame)
    send(tap, ethernet(b"\xff" * 6, parse_mac(MAC), LAST, b""))

    async def over() -> bool:
        world.arrivals(MAC)
        return any(each[12:14] == LAST.to_bytes(2, "big") for _, each in world.frames[seen:])

    await eventually(over)
    return any(each[: len(frame)] == frame for _, each in world.frames[seen:])


def a_packet(source: str, port: int = 9, *, mac: str = MAC) -> bytes:
    ether = Ether(src=mac, dst="ff:ff:ff:ff:ff:ff")
    built: bytes = (ether / IP(src=source, dst="10.0.0.9") / UDP(dport=port) / BOOTP()).build()
    return built


FRAMES = {
    "its own packet": (a_packet("10.0.0.5"), True),
    "its own ARP": (gratuitous_arp_reply(parse_mac(MAC), OWN), True),
    "its own NA": (
        neighbour_advertisement(parse_mac(MAC), ipaddress.IPv6Address("2001:db8::5")),
        True,
    ),
    "RARP": (rarp(parse_mac(MAC)), True),
    "a question for an address": (a_packet("0.0.0.0", 67), True),
    "a packet from nowhere": (a_packet("0.0.0.0", 53), False),
    "another's MAC": (a_packet("10.0.0.5", mac=OTHER), False),
    "another's IP": (a_packet("10.0.0.6"), False),
    "another's IPv6": (
        neighbour_advertisement(parse_mac(MAC), ipaddress.IPv6Address("2001:db8::6")),
        False,
    ),
    "ARP for another's IP": (gratuitous_arp_reply(parse_mac(MAC), FOREIGN), False),
    "ARP in another's name": (
        (Ether(src=MAC, dst="ff:ff:ff:ff:ff:ff") / ARP(op=2, hwsrc=OTHER, psrc="10.0.0.5")).build(),
        False,
    ),
    "a tagged frame": (
        (Ether(src=MAC, dst="ff:ff:ff:ff:ff:ff") / Dot1Q(vlan=7) / IP(src="10.0.0.5")).build(),
        False,
    ),
}


@pytest.mark.lab
@pytest.mark.parametrize("on", [run_bridge, run_macvtap])
def test_a_guest_can_only_be_itself(
    on: Callable[[Callable[[BridgeWorld], Awaitable[None]]], None],
) -> None:
    async def body(world: BridgeWorld) -> None:
        tap = await world.fabric.plug(WEB, 0, NIC)
        try:
            for what, (frame, allowed) in FRAMES.items():
                assert await passed(world, tap, frame) is allowed, what
        finally:
            os.close(tap)

    on(body)


@pytest.mark.lab
def test_rules_come_and_go_with_the_tap() -> None:
    async def body(world: BridgeWorld) -> None:
        table = filters.table_of(tap_name(WEB, 0))
        tap = await world.fabric.plug(WEB, 0, NIC)
        assert await asyncio.to_thread(filters.tables) == {table}
        await world.fabric.unplug(WEB, 0)
        os.close(tap)
        assert await asyncio.to_thread(filters.tables) == frozenset()
        os.close(await world.fabric.plug(WEB, 0, NIC))  # The hypervisor died.
        second = await world.fabric.plug(WEB, 0, NIC)
        successor = BridgeFabric()
        await successor.open()
        assert await asyncio.to_thread(filters.tables) == {table}, "it has a tap again"
        os.close(second)
        await successor.open()
        assert await asyncio.to_thread(filters.tables) == frozenset()
        await successor.close()

    run_bridge(body)


@pytest.mark.lab
def test_what_a_guest_sends_is_limited() -> None:
    async def body(world: BridgeWorld) -> None:
        nic = NicSpec(mac=MAC, bridge="br0", send_limit_bytes_per_s=100_000)
        tap = await world.fabric.plug(WEB, 0, nic)
        try:
            frame = ethernet(b"\xff" * 6, parse_mac(MAC), LAST, bytes(1400))
            began_s = time.monotonic()
            for _ in range(400):
                send(tap, frame)
            took_s = time.monotonic() - began_s  # A second or more in an emulated machine.
            arrived = len(world.arrivals(MAC))
            burst = filters.burst_bytes(100_000) // len(frame)
            assert 1 <= arrived <= 2 * burst + took_s * 100_000 / len(frame)
        finally:
            os.close(tap)

    run_bridge(body)


def test_the_rules_are_made_anew_in_one_transaction() -> None:
    text = filters.ruleset("fy0123456789n0", NIC)
    head = "table netdev ferry_fy0123456789n0\ndelete table netdev ferry_fy0123456789n0\n"
    assert text.startswith(head)
    assert 'device "fy0123456789n0"' in text
    assert "ip saddr != { 0.0.0.0, 10.0.0.5 }" in text


def test_a_nic_without_addresses_is_held_to_its_mac_alone() -> None:
    text = filters.ruleset("fy0123456789n0", NicSpec(mac=MAC, bridge="br0", anti_spoofing=True))
    assert f"ether saddr != {MAC} counter drop" in text
    assert "ip saddr" not in text


def test_nothing_is_filtered_that_nobody_asked_for() -> None:
    assert not filters.wanted(NicSpec(mac=MAC, bridge="br0"))
    assert filters.filter_reasons(NicSpec(mac=MAC, bridge="br0")) == []


@pytest.mark.lab
def test_what_nftables_refuses_is_said_in_its_words() -> None:
    async def body(world: BridgeWorld) -> None:
        with pytest.raises(FabricError, match=r"can't filter: .*syntax error"):
            await asyncio.to_thread(filters.run, "no rule at all", "can't filter")

    run_bridge(body)


@pytest.mark.lab
def test_a_vlan_needs_a_bridge_that_knows_them() -> None:
    async def body(world: BridgeWorld) -> None:
        nic = NicSpec(mac=MAC, bridge="br0", vlan=7)
        (reason,) = await world.fabric.check(nic)
        assert "isn't VLAN-aware" in reason
        with pytest.raises(FabricError, match="VLAN-aware"):
            await world.fabric.plug(WEB, 0, nic)

    run_bridge(body)
