"""A domain above an uplink that moves: silent, waiting, diverted, back again."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec
import pytest
from pyroute2 import IPRoute

from migrator.errors import FabricError
from migrator.model import DomainName, NicSpec
from netfabric import filters
from netfabric.bridge import tunnels
from netfabric.bridge.tunnels import network_identifier
from netfabric.frames import ETHERTYPE_EXPERIMENTAL, ethernet, parse_mac
from netfabric.macvtap import MacvtapFabric, network
from netfabric.macvtap.network import NODES, device_in, macvtaps
from netfabric.taps import VNET_HEADER_BYTES, tap_name, tunnel_name
from node_agent.doctor.findings import Level
from node_agent.doctor.links import check_uplink
from tests.contract.fabric_worlds import MacvtapWorld, eventually, learnt, run_macvtap
from tests.contract.moving_guest import (
    NIC,
    TEST,
    TUNNEL,
    WEB,
    guest_frames,
    numbers_until,
    read_numbers,
    to_all,
    to_guest,
)

pytestmark = pytest.mark.lab


def on_macvtap(body: Callable[[MacvtapWorld], Awaitable[None]]) -> None:
    run_macvtap(body, loopback=True)


def links_of_moves() -> list[str]:
    """Tunnels, forwarders, and the tables of their rules."""
    with IPRoute() as route:
        names = [link.get_attr("IFLA_IFNAME") for link in route.get_links()]
    tables = filters.run("list tables netdev\n", "test").split()
    return [name for name in names if name[:2] in ("fx", "fz")] + [
        name for name in tables if name.startswith("ferry_fx")
    ]


def nodes_here() -> list[Path]:
    """Of this thread's network namespace."""
    namespace = Path("/proc/thread-self/ns/net").stat().st_ino
    return list(NODES.glob(f"ferry-macvtap-{namespace}-*"))


def out_of_the_tunnel(frame: bytes) -> None:
    """As the old node's end sends it (RFC 7348)."""
    identifier = network_identifier(TUNNEL.name, 0)
    header = b"\x08\0\0\0" + (identifier << 8).to_bytes(4, "big")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        sender.bind((TUNNEL.remote, 0))
        sender.sendto(header + frame, (TUNNEL.local, TUNNEL.port))


def test_a_guest_on_its_way_is_silent_and_what_comes_for_it_waits() -> None:
    async def body(world: MacvtapWorld) -> None:
        fd = await world.fabric.plug(WEB, 0, NIC)
        beside_nic = msgspec.structs.replace(NIC, mac="52:54:00:aa:bb:ee", addresses=())
        beside = await world.fabric.plug(DomainName("db"), 0, beside_nic)
        try:
            await world.fabric.prepare_arrival(WEB, [NIC], TUNNEL)
            guest_frames(fd)
            world.far.send(to_all(1))
            world.far.send(to_all(6))
            # An uplink's broadcasts wait in a queue: who has the second one, has the first as well.
            assert await numbers_until(beside, 6) == [1, 6]
            with contextlib.suppress(OSError):  # what a paused guest doesn't do
                own = ethernet(b"\xff" * 6, parse_mac(NIC.mac), TEST, bytes([2]))
                os.write(fd, bytes(VNET_HEADER_BYTES) + own)
            await asyncio.to_thread(out_of_the_tunnel, to_guest(3))
            await world.fabric.open_arrival(WEB)
            await asyncio.to_thread(out_of_the_tunnel, to_guest(4))
            world.far.send(to_all(5))
            waiting: list[bytes] = []

            async def arrived() -> bool:
                waiting.extend(guest_frames(fd))
                return {4, 5} <= {each[14] for each in waiting if each[12:14] == b"\x88\xb6"}

            await eventually(arrived)
            kinds = [each[12:14] for each in waiting]
            filler = kinds.index(ETHERTYPE_EXPERIMENTAL.to_bytes(2, "big"))
            assert filler < kinds.index(TEST.to_bytes(2, "big")), "a paused QEMU loses the first"
            assert not {1, 2, 3} & {each[14] for each in waiting if each[12:14] == b"\x88\xb6"}
            assert list(await world.heard(NIC.mac)) == [], "nobody has heard of it yet"
            assert "sw0" not in await learnt(NIC.mac)
            assert world.fabric.announce_now(WEB) is not None
            assert await world.is_here(NIC.mac)
            assert await world.fabric.end_arrival(WEB) == 2
            assert await asyncio.to_thread(links_of_moves) == []
        finally:
            os.close(fd)
            os.close(beside)

    on_macvtap(body)


def test_what_is_for_a_guest_that_leaves_takes_the_tunnel() -> None:
    async def body(world: MacvtapWorld) -> None:
        fd = await world.fabric.plug(WEB, 0, NIC)
        try:
            await world.fabric.announce(WEB, [NIC])
            await world.fabric.announce(WEB, ())
            await world.fabric.prepare_departure(WEB, [NIC], TUNNEL)
            world.far.send(to_guest(1))
            assert await numbers_until(fd, 1) == [1], "until the last moment all is as before"
            await world.fabric.divert(WEB)
            world.far.send(to_guest(2))
            await world.fabric.shut(WEB)
            for number in (3, 4):
                world.far.send(to_guest(number))
            world.far.send(to_all(5))
            os.close(fd)
            await world.fabric.unplug(WEB, 0)
            world.far.send(to_guest(6))

            async def through() -> bool:
                counted = await asyncio.to_thread(tunnels.frames, [tunnel_name(WEB, 0)])
                return counted[1] == 4

            await eventually(through)
            assert await world.fabric.end_departure(WEB) == 4
            assert await asyncio.to_thread(links_of_moves) == []
            assert await asyncio.to_thread(macvtaps) == []
        finally:
            await world.fabric.close()

    on_macvtap(body)


@pytest.mark.parametrize("restarted", [False, True])
def test_a_guest_that_stays_has_everything_back(restarted: bool) -> None:
    async def body(world: MacvtapWorld) -> None:
        fd = await world.fabric.plug(WEB, 0, NIC)
        fabric = world.fabric
        try:
            await fabric.prepare_departure(WEB, [NIC], TUNNEL)
            await fabric.divert(WEB)
            await fabric.shut(WEB)
            if restarted:
                fabric = MacvtapFabric(network.MacvtapNetwork("br0", "up0"), gaps_s=())
                await fabric.open()
                assert await asyncio.to_thread(links_of_moves) == []
                assert await world.taps() == 1, "its guest is alive"
            await fabric.reopen(WEB, [NIC])
            world.far.send(to_all(1))
            world.far.send(to_guest(2))
            found: set[int] = set()

            async def both() -> bool:  # The kernel takes its time for broadcasts.
                found.update(read_numbers(fd))
                return found == {1, 2}

            await eventually(both)
            assert await asyncio.to_thread(links_of_moves) == []
        finally:
            await fabric.close()
            os.close(fd)

    on_macvtap(body)


def test_what_died_without_an_agent_is_removed_when_one_starts() -> None:
    async def body(world: MacvtapWorld) -> None:
        fd = await world.fabric.plug(WEB, 0, NIC)
        await world.fabric.close()  # It hears of nothing any more.
        os.close(fd)
        assert await world.taps() == 1
        dead = NODES / "ferry-macvtap-1-7"  # No namespace has such a number.
        dead.touch()
        assert await asyncio.to_thread(nodes_here)
        successor = MacvtapFabric(network.MacvtapNetwork("br0", "up0"), gaps_s=())
        await successor.open()
        await successor.close()
        assert await world.taps() == 0
        assert await asyncio.to_thread(nodes_here) == []
        assert not dead.exists()

    on_macvtap(body)


def test_a_restarted_agent_hears_of_a_hypervisors_death() -> None:
    async def body(world: MacvtapWorld) -> None:
        fd = await world.fabric.plug(WEB, 0, NIC)
        await world.fabric.close()
        successor = MacvtapFabric(network.MacvtapNetwork("br0", "up0"), gaps_s=())
        await successor.open()
        await successor.watch(WEB, [NIC])
        os.close(fd)

        async def gone() -> bool:
            return await world.taps() == 0

        await eventually(gone)
        await successor.close()

    on_macvtap(body)


def test_two_guests_of_one_node_reach_each_other() -> None:
    async def body(world: MacvtapWorld) -> None:
        fd = await world.fabric.plug(WEB, 0, NIC)
        other_nic = NicSpec(mac="52:54:00:aa:bb:dd", bridge="br0")
        other = await world.fabric.plug(DomainName("db"), 0, other_nic)
        try:
            frame = ethernet(parse_mac(other_nic.mac), parse_mac(NIC.mac), TEST, bytes([7]))
            os.write(fd, bytes(VNET_HEADER_BYTES) + frame)
            assert await numbers_until(other, 7) == [7]
            assert read_numbers(fd) == []
        finally:
            os.close(fd)
            os.close(other)

    on_macvtap(body)


def test_a_guest_hears_of_every_group() -> None:
    """Neighbour discovery asks a group that only the guest itself knows it is in."""

    async def body(world: MacvtapWorld) -> None:
        fd = await world.fabric.plug(WEB, 0, NIC)
        try:
            group = bytes.fromhex("3333ff000005")
            world.far.send(ethernet(group, to_guest(1)[6:12], TEST, bytes([9])))
            assert await numbers_until(fd, 9) == [9]
        finally:
            os.close(fd)

    on_macvtap(body)


def test_a_guest_is_held_to_its_rate_in_both_directions() -> None:
    async def body(world: MacvtapWorld) -> None:
        nic = msgspec.structs.replace(
            NIC, receive_limit_bytes_per_s=10_000, send_limit_bytes_per_s=10_000
        )
        fd = await world.fabric.plug(WEB, 0, nic)
        try:
            for _ in range(200):
                world.far.send(ethernet(parse_mac(NIC.mac), to_guest(1)[6:12], TEST, bytes(1000)))
            own = ethernet(to_guest(1)[6:12], parse_mac(NIC.mac), TEST, bytes(1000))
            for _ in range(200):
                os.write(fd, bytes(VNET_HEADER_BYTES) + own)
            table = filters.table_of(tap_name(WEB, 0))
            rules = await asyncio.to_thread(filters.run, f"list table netdev {table}\n", "test")
            dropped = [int(part.split()[0]) for part in rules.split("packets ")[1:]]
            assert len(dropped) == 2
            assert all(0 < each < 200 for each in dropped), rules
        finally:
            os.close(fd)

    on_macvtap(body)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"vlan": 7}, "whose uplink is that VLAN's interface"),
        ({"bridge": "br9"}, "their network is called br0"),
        ({"mtu_bytes": 9000}, "up0 has an MTU of 1500 bytes"),
    ],
)
def test_what_an_uplink_cannot_carry_is_refused(changed: dict[str, object], reason: str) -> None:
    async def body(world: MacvtapWorld) -> None:
        nic = msgspec.structs.replace(NIC, **changed)
        assert any(reason in each for each in await world.fabric.check(nic))
        with pytest.raises(FabricError, match=reason):
            await world.fabric.plug(WEB, 0, nic)
        assert await world.taps() == 0

    on_macvtap(body)


@pytest.mark.parametrize(
    ("uplink", "reason"), [("no9", "no interface no9"), ("up1", "is a bridge's port")]
)
def test_an_uplink_that_cannot_have_guests_is_refused(uplink: str, reason: str) -> None:
    async def body(world: MacvtapWorld) -> None:
        fabric = MacvtapFabric(network.MacvtapNetwork("br0", uplink), gaps_s=())
        assert any(reason in each for each in await fabric.check(NIC))
        await fabric.close()

    on_macvtap(body)


@pytest.mark.parametrize(
    ("uplink", "level", "detail"),
    [
        ("up0", Level.OK, "MTU 1500"),
        ("up1", Level.FAILURE, "port"),
        ("no9", Level.FAILURE, "no such"),
    ],
)
def test_the_doctor_looks_at_an_uplink(uplink: str, level: Level, detail: str) -> None:
    async def body(world: MacvtapWorld) -> None:
        finding = await asyncio.to_thread(check_uplink, uplink)
        assert finding.level is level
        assert detail in finding.detail

    on_macvtap(body)


def test_a_device_is_told_by_its_interface_alone() -> None:
    told = (
        b"add@/devices/virtual/net/fya/macvtap/tap4\0ACTION=add\0"
        b"DEVPATH=/devices/virtual/net/fya/macvtap/tap4\0SUBSYSTEM=macvtap\0MAJOR=246\0MINOR=1\0"
    )
    assert device_in(told, "fya") == os.makedev(246, 1)
    assert device_in(told, "fyb") is None
    assert device_in(told.replace(b"add", b"remove"), "fya") is None
    assert device_in(b"libudev\0\xfe\xed\xca\xfe", "fya") is None
