"""A guest in a VLAN moves from one node's bridge to another's; another VLAN's has the same MAC."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import os
import struct
from collections.abc import AsyncIterator

import msgspec
import pytest

from migrator.model import DomainName, NicSpec
from migrator.ports import Tunnel, TunnelReport
from netfabric.frames import announcements, ethernet, gratuitous_arp_reply, parse_mac
from netfabric.taps import tap_name, tunnel_name
from netfabric.vlan_table import Vlans
from tests.contract.fabric_worlds import eventually
from tests.contract.moving_guest import guest_frames
from tests.contract.two_nodes import FAR, NEAR
from tests.debian_kernel.inside.vlan_bridge import PVID, numbers_in, to_all, vlans_of
from tests.debian_kernel.inside.vlan_nodes import VlanNodes, entries, on_vlans, send_from_guest

WEB, DB = DomainName("web"), DomainName("db")
MAC_TEXT, CLIENT = "52:54:00:aa:bb:cc", b"\x52\x54\0\0\0\x01"
MAC = parse_mac(MAC_TEXT)
NIC = NicSpec(mac=MAC_TEXT, bridge="br0", vlan=7, addresses=("10.0.0.5",))
IN_8 = msgspec.structs.replace(NIC, vlan=8, addresses=("10.8.0.5",))
OUT = Tunnel(name="m1", local=NEAR, remote=FAR, port=7782)
BACK = Tunnel(name="m1", local=FAR, remote=NEAR, port=7782)


def to_guest(number: int) -> bytes:
    return ethernet(MAC, CLIENT, 0x88B6, bytes([number]))


async def heard_by(fd: int, *expected: int) -> None:
    """These numbers have come, and no others."""
    found: list[int] = []

    async def arrived() -> bool:
        found.extend(numbers_in(fd))
        return len(found) >= len(expected)

    await eventually(arrived)
    assert tuple(found) == expected


@contextlib.asynccontextmanager
async def on_its_way(nodes: VlanNodes, nic: NicSpec) -> AsyncIterator[tuple[int, int]]:
    """The guest runs near, and its network is ready at both nodes; its taps there."""
    near = await nodes.near.plug(WEB, 0, nic)
    far = await nodes.there(lambda: nodes.far.plug(WEB, 0, nic))
    try:
        await nodes.near.announce(WEB, [nic])
        await nodes.near.announce(WEB, ())
        await nodes.near.prepare_departure(WEB, [nic], OUT)
        await nodes.there(lambda: nodes.far.prepare_arrival(WEB, [nic], BACK))
        yield near, far
    finally:
        os.close(near)
        os.close(far)


async def answers(fd: int, address: str) -> None:
    """As the guest does when it is asked for its address, once."""
    own = ipaddress.IPv4Address(address)
    while True:
        for frame in guest_frames(fd):
            if frame[12:14] == b"\x08\x06" and frame[38:42] == own.packed:
                reply = gratuitous_arp_reply(MAC, own)
                asker = frame[6:12]
                send_from_guest(fd, asker + reply[6:32] + asker + bytes(4) + reply[42:])
                return
        await asyncio.sleep(0.005)


@pytest.mark.parametrize("vlan", [7, None])
def test_a_guest_moves_within_its_vlan_and_loses_nothing(vlan: int | None) -> None:
    nic, client_vlan = msgspec.structs.replace(NIC, vlan=vlan), vlan or 1

    async def body(nodes: VlanNodes) -> None:
        client, tunnel = nodes.client(client_vlan), tunnel_name(WEB, 0)
        async with on_its_way(nodes, nic) as (near, far):
            await nodes.switch_learns(nic.mac, client_vlan, "sw-near")
            membership = (Vlans(client_vlan, client_vlan, **PVID),)
            assert await asyncio.to_thread(vlans_of, tunnel) == membership
            assert await nodes.at_far(lambda: vlans_of(tunnel)) == membership

            await nodes.near.send_through(WEB, [nic])

            async def wide_enough() -> bool:
                (report,) = await nodes.there(lambda: nodes.far.heard_through(WEB, [nic]))
                return report == TunnelReport(short=True, full=True)

            await eventually(wide_enough)
            client.send(to_all(1))
            client.send(to_guest(2))
            await heard_by(near, 1, 2)
            assert numbers_in(far) == [], "silent until the guest is here"

            await nodes.near.divert(WEB)
            await nodes.near.shut(WEB)
            await nodes.there(lambda: nodes.far.open_arrival(WEB))
            assert (await asyncio.to_thread(entries, "br0", nic.mac))[client_vlan] == tunnel
            for number in (3, 4, 5):
                client.send(to_guest(number))
            await heard_by(far, 3, 4, 5)
            assert numbers_in(near) == []
            for other in {1, 7, 8} - {client_vlan}:
                nodes.client(other).send(to_guest(9))
                nodes.client(other).send(to_all(9))

            async def announced() -> float | None:
                return nodes.far.announce_now(WEB)

            assert await nodes.there(announced) is not None
            tag = None if vlan is None else vlan
            expected = list(announcements(nic))
            assert nodes.wires["sw-far"].from_mac(MAC) == [(tag, each) for each in expected]
            assert client.from_mac(MAC)[-len(expected) :] == [(None, each) for each in expected]
            await nodes.switch_learns(nic.mac, client_vlan, "sw-far")
            await nodes.there(lambda: nodes.far.announce(WEB, [nic]))
            client.send(to_guest(6))
            await heard_by(far, 6)

            answering = asyncio.create_task(answers(far, nic.addresses[0]))
            report = await nodes.near.probe(nic, 5.0)
            await answering
            assert report.answered == nic.addresses
            assert report.learnt_at == tunnel
            assert 3 <= await nodes.near.end_departure(WEB) <= 5
            await nodes.there(lambda: nodes.far.end_arrival(WEB))
            assert await asyncio.to_thread(entries, "br0", nic.mac) in ({}, {client_vlan: "up0"})
            here = await nodes.at_far(lambda: entries("br0", nic.mac))
            assert here == {client_vlan: tap_name(WEB, 0)}
            client.send(to_guest(7))
            await heard_by(far, 7)

    on_vlans(body)


def test_two_guests_with_one_mac_in_two_vlans_go_their_own_ways() -> None:
    async def body(nodes: VlanNodes) -> None:
        stays = await nodes.near.plug(DB, 0, IN_8)
        try:
            async with on_its_way(nodes, NIC) as (_, far):
                await nodes.near.announce(DB, [IN_8])
                await nodes.near.divert(WEB)
                await nodes.near.shut(WEB)
                await nodes.there(lambda: nodes.far.open_arrival(WEB))
                nodes.client(7).send(to_guest(1))
                nodes.client(8).send(to_guest(2))
                await heard_by(far, 1)
                await heard_by(stays, 2)
                await nodes.there(lambda: nodes.far.announce(WEB, [NIC]))
                await nodes.switch_learns(NIC.mac, 7, "sw-far")
                assert await nodes.switch_has(NIC.mac, 8) == "sw-near"
                in_7 = await nodes.near.probe(NIC, 0.05)
                in_8 = await nodes.near.probe(IN_8, 0.05)
                assert in_7.learnt_at == tunnel_name(WEB, 0)
                assert in_8.learnt_at == tap_name(DB, 0)
                await nodes.near.end_departure(WEB)
                nodes.client(8).send(to_guest(3))
                await heard_by(stays, 3)
        finally:
            os.close(stays)

    on_vlans(body)


def test_a_guest_that_stays_has_its_vlan_back() -> None:
    async def body(nodes: VlanNodes) -> None:
        async with on_its_way(nodes, NIC) as (near, _):
            await nodes.near.divert(WEB)
            await nodes.near.shut(WEB)
            await nodes.near.reopen(WEB, [NIC])
            await nodes.there(lambda: nodes.far.unplug(WEB, 0))
            assert await asyncio.to_thread(entries, "br0", NIC.mac) == {7: tap_name(WEB, 0)}
            nodes.client(7).send(to_all(1))
            nodes.client(7).send(to_guest(2))
            await heard_by(near, 1, 2)
            send_from_guest(near, to_guest(3)[6:12] + MAC + struct.pack("!H", 0x88B6) + b"\x03")

            async def client_hears() -> bool:
                return any(
                    frame[12:14] == b"\x88\xb6" for _, frame in nodes.client(7).from_mac(MAC)
                )

            await eventually(client_hears)

    on_vlans(body)
