"""What a VLAN-aware bridge's NICs get, and whom they reach."""

from __future__ import annotations

import asyncio
import ipaddress
import os
import socket
from typing import Any

import msgspec
import pytest
from pyroute2 import IPRoute

from migrator.errors import FabricError
from migrator.model import DomainName, NicSpec
from netfabric.frames import announcements, ethernet, gratuitous_arp_reply, parse_mac
from netfabric.link_table import link_named
from netfabric.taps import tap_name
from netfabric.vlan_table import Vlans, port_vlans
from node_agent.doctor.findings import Level
from node_agent.doctor.links import check_kernel_links
from tests.contract.fabric_worlds import eventually
from tests.contract.moving_guest import guest_frames
from tests.contract.namespaces import run_in_new_namespace
from tests.debian_kernel.inside.vlan_nodes import (
    VlanNodes,
    attach,
    entries,
    make_bridge,
    on_vlans,
    set_vlan,
    unset_vlan,
)

WEB, DB = DomainName("web"), DomainName("db")
NIC = NicSpec(mac="52:54:00:aa:bb:cc", bridge="br0", vlan=7, addresses=("10.0.0.5", "2001:db8::5"))
BARE = NicSpec(mac="52:54:00:aa:bb:dd", bridge="br0", vlan=7)
NATIVE = msgspec.structs.replace(NIC, vlan=None)
IN_8 = msgspec.structs.replace(BARE, vlan=8)
MAC = parse_mac(NIC.mac)
EVERYBODY = b"\xff" * 6
CLIENT = b"\x52\x54\0\0\0\x01"
TEST = 0x88B6
PVID = {"pvid": True, "untagged": True}


def to_all(number: int) -> bytes:
    return ethernet(EVERYBODY, CLIENT, TEST, bytes([number]))


def numbers_in(fd: int) -> list[int]:
    return [frame[14] for frame in guest_frames(fd) if frame[12:14] == TEST.to_bytes(2, "big")]


def vlans_of(port: str) -> tuple[Vlans, ...]:
    return port_vlans().get(socket.if_nametoindex(port), ())


# --- what the kernel tells -------------------------------------------------------------------


def _by_pyroute2() -> dict[int, list[tuple[int, bool, bool]]]:
    found: dict[int, list[tuple[int, bool, bool]]] = {}
    with IPRoute() as route:
        messages = list(route.get_vlans())
    for message in messages:
        told = message.get_attr("IFLA_AF_SPEC")
        for entry in told.get_attrs("IFLA_BRIDGE_VLAN_INFO") if told is not None else ():
            flags = entry["flags"]
            found.setdefault(message["index"], []).append(
                (entry["vid"], bool(flags & 2), bool(flags & 4))
            )
    return found


def _make_ports() -> None:
    make_bridge("br0", br_vlan_default_pvid=5, br_vlan_protocol=0x88A8)
    make_bridge("br1", br_vlan_default_pvid=0)
    with IPRoute() as route:
        for number in range(4):
            route.link("add", ifname=f"v{number}", kind="veth", peer=f"w{number}")
    for number in range(3):
        attach(f"v{number}", "br0")
    attach("v3", "br1")
    for vlan_id in (7, 8, 9, 11):
        set_vlan("v1", vlan_id)
    set_vlan("v1", 10, "untagged")
    set_vlan("v2", 12, "pvid")


def test_vlans_are_read_as_pyroute2_reads_them() -> None:
    async def body() -> None:
        await asyncio.to_thread(_make_ports)
        expected = await asyncio.to_thread(_by_pyroute2)
        found = {
            index: [
                (vlan_id, each.pvid, each.untagged)
                for each in told
                for vlan_id in range(each.first, each.last + 1)
            ]
            for index, told in (await asyncio.to_thread(port_vlans)).items()
        }
        assert found == expected
        assert await asyncio.to_thread(vlans_of, "v1") == (
            Vlans(5, 5, **PVID),
            Vlans(7, 9),
            Vlans(10, 10, untagged=True),
            Vlans(11, 11),
        )
        bridges = [await asyncio.to_thread(link_named, name) for name in ("br0", "br1")]
        told = [
            (link.vlan_filtering, link.vlan_default, link.vlan_ethertype)
            for link in bridges
            if link is not None
        ]
        assert told == [(True, 5, 0x88A8), (True, None, 0x8100)]

    run_in_new_namespace(body)


def test_the_doctor_finds_vlan_aware_bridges() -> None:
    (found,) = [each for each in check_kernel_links() if each.check == "VLAN-aware bridges"]
    assert found.level is Level.OK, found


# --- plugging --------------------------------------------------------------------------------


def test_a_tap_is_in_its_vlan_alone_and_leaves_nothing() -> None:
    async def body(nodes: VlanNodes) -> None:
        tap = tap_name(WEB, 0)
        before = await asyncio.to_thread(port_vlans)
        fd = await nodes.near.plug(WEB, 0, NIC)
        try:
            assert await asyncio.to_thread(vlans_of, tap) == (Vlans(7, 7, **PVID),)
            await nodes.near.announce(WEB, [NIC])
            assert await asyncio.to_thread(entries, "br0", NIC.mac) == {7: tap}
            await nodes.near.unplug(WEB, 0)
            assert await asyncio.to_thread(port_vlans) == before
            assert await asyncio.to_thread(entries, "br0", NIC.mac) == {}
        finally:
            os.close(fd)

    on_vlans(body)


@pytest.mark.parametrize("vlan", [4095, 0])
def test_a_vlan_that_there_is_none_of_is_refused_and_leaves_no_tap(vlan: int) -> None:
    async def body(nodes: VlanNodes) -> None:
        nic = msgspec.structs.replace(NIC, vlan=vlan)
        with pytest.raises(FabricError, match=f"a VLAN is from 1 to 4094, not {vlan}"):
            os.close(await nodes.near.plug(WEB, 0, nic))
        assert await asyncio.to_thread(link_named, tap_name(WEB, 0)) is None

    on_vlans(body)


def test_a_trunk_of_all_vlans_carries_a_nics() -> None:
    """Which is read as one range."""

    async def body(nodes: VlanNodes) -> None:
        def trunk() -> None:
            for port in ("up0", "sw-near"):
                set_vlan(port, "2-4094")

        await asyncio.to_thread(trunk)
        assert await asyncio.to_thread(vlans_of, "up0") == (Vlans(1, 1, **PVID), Vlans(2, 4094))
        fd = await nodes.near.plug(WEB, 0, NIC)
        try:
            await nodes.near.announce(WEB, [NIC])
            assert nodes.client(7).from_mac(MAC) != []
            assert nodes.client(8).from_mac(MAC) == []
        finally:
            os.close(fd)

    on_vlans(body)


def test_an_uplink_outside_of_the_vlan_is_told() -> None:
    async def body(nodes: VlanNodes) -> None:
        token = b"12345678"
        await asyncio.to_thread(unset_vlan, "up0", 7)
        report = await nodes.near.hear_wide(NIC, token, 0.05)
        assert report.cut_off == "its uplink up0 isn't in VLAN 7 (bridge vlan show)"
        assert (await nodes.near.hear_wide(NATIVE, token, 0.05)).cut_off == ""
        assert (await nodes.near.hear_wide(IN_8, token, 0.05)).cut_off == ""

    on_vlans(body)


# --- who hears whom --------------------------------------------------------------------------


def test_an_announcement_leaves_tagged_and_is_heard_in_its_vlan_alone() -> None:
    async def body(nodes: VlanNodes) -> None:
        nics = (NIC, BARE)
        fds = [await nodes.near.plug(WEB, index, nic) for index, nic in enumerate(nics)]
        others = [await nodes.near.plug(DB, 0, IN_8)]
        beside = await nodes.near.plug(
            DB, 1, msgspec.structs.replace(NIC, mac="52:54:00:aa:bb:ee", addresses=())
        )
        try:
            await nodes.near.announce(WEB, nics)
            at_home = guest_frames(beside)
            for nic in nics:  # ARP in both forms and ND of the one, RARP of the other.
                mac, expected = parse_mac(nic.mac), list(announcements(nic))
                assert nodes.wires["sw-near"].from_mac(mac) == [(7, each) for each in expected]
                assert nodes.client(7).from_mac(mac) == [(None, each) for each in expected]
                assert nodes.client(8).from_mac(mac) == []
                assert nodes.client(1).from_mac(mac) == []
                assert [each for each in at_home if each[6:12] == mac] == expected
                assert await nodes.switch_has(nic.mac, 7) == "sw-near"
            assert [each for each in guest_frames(others[0]) if each[6:12] == MAC] == []
        finally:
            for fd in (*fds, *others, beside):
                os.close(fd)

    on_vlans(body)


def test_a_guest_without_a_vlan_is_in_that_of_new_ports() -> None:
    """Also where the node itself is no member of it."""

    async def body(nodes: VlanNodes) -> None:
        await asyncio.to_thread(lambda: unset_vlan("br0", 1, on_bridge=True))
        fd = await nodes.near.plug(WEB, 0, NATIVE)
        try:
            await nodes.near.announce(WEB, [NATIVE])
            expected = [(None, each) for each in announcements(NATIVE)]
            assert nodes.wires["sw-near"].from_mac(MAC) == expected
            assert nodes.client(1).from_mac(MAC) == expected
            assert nodes.client(7).from_mac(MAC) == []
            for number, vlan_id in enumerate((7, 8, 1)):
                nodes.client(vlan_id).send(to_all(number))

            async def arrived() -> bool:
                return numbers_in(fd) == [2]

            await eventually(arrived)
            assert (await nodes.near.probe(NATIVE, 0.05)).able
            assert (await nodes.near.hear_wide(NATIVE, b"12345678", 0.05)).cut_off == ""
        finally:
            os.close(fd)

    on_vlans(body)


def test_a_guest_hears_its_own_vlan_and_no_other() -> None:
    async def body(nodes: VlanNodes) -> None:
        in_7 = await nodes.near.plug(WEB, 0, NIC)
        in_8 = await nodes.near.plug(DB, 0, IN_8)
        try:
            for number, vlan_id in enumerate((1, 7, 8)):
                nodes.client(vlan_id).send(to_all(number))
            for fd, number in ((in_7, 1), (in_8, 2)):
                heard: list[int] = []

                async def arrived(fd: int = fd, heard: list[int] = heard) -> bool:
                    heard.extend(numbers_in(fd))
                    return bool(heard)

                await eventually(arrived)
                assert heard == [number]
        finally:
            os.close(in_7)
            os.close(in_8)

    on_vlans(body)


# --- asking ----------------------------------------------------------------------------------


def test_a_probe_hears_its_vlan_alone() -> None:
    """A MAC may be somebody else's in another VLAN."""

    async def body(nodes: VlanNodes) -> None:
        says = gratuitous_arp_reply(MAC, ipaddress.IPv4Address("10.0.0.5"))
        bare = msgspec.structs.replace(NIC, addresses=())
        for vlan_id, heard in ((8, ()), (1, ()), (7, ("arp",))):
            asking = asyncio.create_task(nodes.near.probe(bare, 5.0 if heard else 0.5))
            while not asking.done():
                nodes.client(vlan_id).send(says)
                await asyncio.wait({asking}, timeout=0.02)
            assert asking.result().heard == heard
        native = msgspec.structs.replace(bare, vlan=None)
        asking = asyncio.create_task(nodes.near.probe(native, 0.5))
        while not asking.done():
            nodes.client(7).send(says)
            await asyncio.wait({asking}, timeout=0.02)
        assert asking.result().heard == ()
        # And the bridge's table has it in each: of three, the one that was asked for.
        assert asking.result().learnt_at == "up0"

    on_vlans(body)


@pytest.mark.parametrize("ethertype", [0x8100, 0x88A8])
def test_full_frames_cross_the_trunk_in_the_vlan(ethertype: int) -> None:
    token = b"12345678"

    async def body(nodes: VlanNodes) -> None:
        def switch_tags() -> None:
            with IPRoute() as route:
                for name in ("br0", "sw0"):
                    for bridge in route.link_lookup(ifname=name):
                        route.link("set", index=bridge, kind="bridge", br_vlan_protocol=ethertype)

        await asyncio.to_thread(switch_tags)
        await nodes.at_far(switch_tags)

        async def hears(nic: NicSpec) -> Any:
            hearing = asyncio.create_task(
                nodes.there(lambda: nodes.far.hear_wide(nic, token, 5.0 if nic is NIC else 0.5))
            )
            while not hearing.done():
                await nodes.near.send_wide(NIC, token)
                await asyncio.wait({hearing}, timeout=0.02)
            return hearing.result()

        report = await hears(NIC)
        assert (report.short, report.full) == (True, True)
        report = await hears(IN_8)
        assert (report.short, report.full) == (False, False), "that is another network"

    on_vlans(body)
