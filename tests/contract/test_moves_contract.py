"""A domain that moves, as the kernel's bridges see it: silent, waiting, diverted, back again."""

from __future__ import annotations

import asyncio
import ipaddress
import os
import socket
import time
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager

import msgspec
import pytest
from pyroute2 import IPRoute

from migrator.errors import FabricError
from migrator.model import NicSpec
from migrator.ports import WidthReport
from netfabric import wide_frames
from netfabric.bridge import BridgeFabric
from netfabric.bridge.tunnels import network_identifier
from netfabric.frames import (
    ETHERTYPE_EXPERIMENTAL,
    ethernet,
    gratuitous_arp_reply,
    gratuitous_arp_request,
    parse_mac,
)
from netfabric.taps import VNET_HEADER_BYTES, tunnel_name
from tests.contract.fabric_worlds import (
    Body,
    BridgeWorld,
    World,
    bridge_world,
    eventually,
    learnt,
    macvtap_world,
    run_bridge,
    run_macvtap,
    run_simulated,
)
from tests.contract.moving_guest import (
    CLIENT,
    NIC,
    TEST,
    TUNNEL,
    WEB,
    guest_frames,
    numbers_until,
    read_numbers,
    says_its_address,
    to_all,
    to_guest,
)
from tests.contract.namespaces import run_in_world

pytestmark = pytest.mark.lab


@pytest.fixture(params=["simulated", "bridge", "macvtap"])
def run(request: pytest.FixtureRequest) -> Callable[[Body], None]:
    runs: dict[str, Callable[[Body], None]] = {
        "simulated": run_simulated,
        "bridge": run_bridge,
        "macvtap": run_macvtap,
    }
    return runs[request.param]


def test_every_step_of_a_move_may_come_twice_or_without_the_ones_before(
    run: Callable[[Body], None],
) -> None:
    async def body(world: World) -> None:
        fabric = world.fabric
        await fabric.open()
        for _ in range(2):
            await fabric.divert(WEB)
            await fabric.shut(WEB)
            await fabric.reopen(WEB, [NIC])
            await fabric.open_arrival(WEB)
            assert await fabric.end_departure(WEB) == 0
            assert await fabric.end_arrival(WEB) == 0
        assert fabric.announce_now(WEB) is None

    run(body)


def on_bridge(body: Callable[[BridgeWorld], Awaitable[None]]) -> None:
    run_bridge(body, loopback=True)


def test_a_port_takes_nothing_until_the_guest_is_about_to_come() -> None:
    async def body(world: BridgeWorld) -> None:
        fd = await world.fabric.plug(WEB, 0, NIC)
        try:
            await world.fabric.prepare_arrival(WEB, [NIC], TUNNEL)
            await world.move_away(NIC.mac)
            filler = guest_frames(fd)
            expected = ETHERTYPE_EXPERIMENTAL.to_bytes(2, "big")
            assert expected in [frame[12:14] for frame in filler]
            world.far.send(to_all(1))
            await world.fabric.open_arrival(WEB)
            # The guest still speaks at its old place: that moves nothing any more.
            world.far.send(ethernet(b"\xff" * 6, parse_mac(NIC.mac), TEST, bytes([2])))
            assert (await learnt(NIC.mac))["br0"].startswith("fy")
            world.far.send(to_guest(3))  # The switch floods it no more: it knows the old place.
            world.far.send(to_all(4))
            assert await numbers_until(fd, 4) == [2, 4]
        finally:
            os.close(fd)

    on_bridge(body)


def test_the_first_announcement_moves_the_switch_and_the_last_gives_the_guest_free() -> None:
    async def body(world: BridgeWorld) -> None:
        fd = await world.fabric.plug(WEB, 0, NIC)
        try:
            await world.fabric.prepare_arrival(WEB, [NIC], TUNNEL)
            await world.move_away(NIC.mac)
            await world.fabric.open_arrival(WEB)
            assert world.fabric.announce_now(WEB) is not None
            assert await world.is_here(NIC.mac)
            await world.fabric.announce(WEB, [NIC])
            await world.fabric.announce(WEB, ())
            await world.move_away(NIC.mac)  # Not pinned any more.
            await world.fabric.end_arrival(WEB)
            assert await tunnels_here() == []
        finally:
            os.close(fd)

    on_bridge(body)


@pytest.mark.parametrize("make", [bridge_world, macvtap_world])
def test_a_guests_first_frames_are_those_after_its_resume(
    make: Callable[[], AbstractAsyncContextManager[BridgeWorld]],
) -> None:
    """Stamped by the kernel, however late they are read; what waited for it doesn't count."""

    async def body(world: BridgeWorld) -> None:
        fd = await world.fabric.plug(WEB, 0, NIC)
        try:
            await world.fabric.prepare_arrival(WEB, [NIC], TUNNEL)
            await world.fabric.open_arrival(WEB)
            world.far.send(to_all(1))
            assert await numbers_until(fd, 1) == [1]
            resumed_at_s = time.time()
            world.far.send(to_all(2))
            assert await numbers_until(fd, 2) == [2]
            own = ethernet(b"\xff" * 6, parse_mac(NIC.mac), TEST, bytes([3]))
            os.write(fd, bytes(VNET_HEADER_BYTES) + own)
            read_at_s = time.time()
            first = await world.fabric.first_frames(WEB, resumed_at_s, 5.0)
            assert first.to_guest_at_s is not None
            assert first.from_guest_at_s is not None
            assert resumed_at_s <= first.to_guest_at_s <= first.from_guest_at_s <= read_at_s
            await world.fabric.end_arrival(WEB)
        finally:
            os.close(fd)

    run_in_world(make, body)


def test_what_is_for_a_guest_that_leaves_takes_the_tunnel() -> None:
    async def body(world: BridgeWorld) -> None:
        fd = await world.fabric.plug(WEB, 0, NIC)
        try:
            await world.fabric.announce(WEB, [NIC])
            await world.fabric.announce(WEB, ())
            await world.fabric.prepare_departure(WEB, [NIC], TUNNEL)
            world.far.send(to_guest(1))
            assert await numbers_until(fd, 1) == [1], "until the last moment all is as before"
            await world.fabric.divert(WEB)
            await world.fabric.shut(WEB)
            for number in (2, 3, 4):
                world.far.send(to_guest(number))
            world.far.send(to_all(5))
            # The new place speaks up, and what is still on its way here must get there, too.
            await world.announce_elsewhere(NIC.mac)
            assert (await learnt(NIC.mac))["br0"] == tunnel_name(WEB, 0)
            forwarded = await world.fabric.end_departure(WEB)
            assert 3 <= forwarded <= 5, "the bridge itself may say a word or two by each port"
            assert read_numbers(fd) == []
            assert await tunnels_here() == []
        finally:
            os.close(fd)

    on_bridge(body)


def test_what_the_node_itself_says_to_all_does_not_take_the_tunnel() -> None:
    async def body(world: BridgeWorld) -> None:
        fd = await world.fabric.plug(WEB, 0, NIC)
        try:
            await world.fabric.prepare_departure(WEB, [NIC], TUNNEL)
            await world.fabric.divert(WEB)
            with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0) as node:
                for number in range(5):
                    node.sendto(to_all(number), ("br0", 0))
                    node.sendto(ethernet(b"\x33\x33\0\0\0\1", CLIENT, TEST, b""), ("br0", 0))
                node.sendto(to_guest(9), ("br0", 0))
            assert await world.fabric.end_departure(WEB) == 1
        finally:
            os.close(fd)

    on_bridge(body)


@pytest.mark.parametrize("restarted", [False, True])
def test_a_guest_that_stays_has_everything_back(restarted: bool) -> None:
    async def body(world: BridgeWorld) -> None:
        fd = await world.fabric.plug(WEB, 0, NIC)
        fabric = world.fabric
        try:
            await fabric.prepare_departure(WEB, [NIC], TUNNEL)
            await fabric.divert(WEB)
            await fabric.shut(WEB)
            if restarted:
                fabric = BridgeFabric(gaps_s=())
                await fabric.open()
                assert await tunnels_here() == []
            await fabric.reopen(WEB, [NIC])
            assert (await learnt(NIC.mac))["br0"].startswith("fy")
            world.far.send(to_all(1))
            world.far.send(to_guest(2))
            assert await numbers_until(fd, 2) == [1, 2]
            assert await tunnels_here() == []
        finally:
            await fabric.close()
            os.close(fd)

    on_bridge(body)


def test_a_probe_finds_a_guest_beyond_the_uplink_and_only_there() -> None:
    async def body(world: BridgeWorld) -> None:
        await world.move_away(NIC.mac)
        asking = asyncio.create_task(world.fabric.probe(NIC, 20.0))
        await world.answer_arp(NIC)
        report = await asking
        assert report.able
        assert report.answered == ("10.0.0.5",)
        assert "arp" in report.heard
        silent = await world.fabric.probe(NicSpec(mac="52:54:00:aa:bb:dd", bridge="br0"), 0.05)
        assert (silent.able, silent.heard) == (True, ())
        elsewhere = await world.fabric.probe(NicSpec(mac=NIC.mac, bridge="br9"), 0.05)
        assert not elsewhere.able
        assert "br9" in elsewhere.detail

    on_bridge(body)


def test_a_tunnels_identifier_is_the_same_at_both_ends_and_another_for_each_nic() -> None:
    found = {network_identifier(f"migration{n}", index) for n in range(50) for index in range(4)}
    assert len(found) == 200
    assert all(0 < each < 1 << 24 for each in found)
    assert network_identifier("m1", 0) == network_identifier("m1", 0)


async def tunnels_here() -> list[str]:
    def look() -> list[str]:
        with IPRoute() as route:
            names = [link.get_attr("IFLA_IFNAME") for link in route.get_links()]
            return [name for name in names if name.startswith("fx")]

    return await asyncio.to_thread(look)


def test_a_guests_addresses_are_learnt_from_its_own_frames_and_told_on() -> None:
    async def body(world: BridgeWorld) -> None:
        nic = NicSpec(mac=NIC.mac, bridge="br0")
        fd = await world.fabric.plug(WEB, 0, nic)
        mac = parse_mac(NIC.mac)
        try:
            own = gratuitous_arp_reply(mac, ipaddress.IPv4Address("10.0.0.5"))
            os.write(fd, bytes(VNET_HEADER_BYTES) + own)
            world.far.send(gratuitous_arp_reply(CLIENT, ipaddress.IPv4Address("10.0.0.9")))

            async def learnt_it() -> bool:
                return list(world.fabric.learnt(WEB, [nic])) == [("10.0.0.5",)]

            await eventually(learnt_it)
            # As the destination of its next move it announces them, though no definition names any.
            await world.fabric.prepare_arrival(WEB, [nic], TUNNEL)
            await world.fabric.open_arrival(WEB, [("10.0.0.7",)])
            assert world.fabric.announce_now(WEB) is not None
            assert list(world.fabric.learnt(WEB, [nic])) == [("10.0.0.5", "10.0.0.7")]

            async def heard() -> bool:
                asked = gratuitous_arp_request(mac, ipaddress.IPv4Address("10.0.0.7"))
                return asked in await world.heard(NIC.mac)

            await eventually(heard)
        finally:
            os.close(fd)

    on_bridge(body)


@pytest.mark.parametrize("make", [bridge_world, macvtap_world])
@pytest.mark.parametrize("stays", [True, False])
def test_a_guest_is_watched_on_where_it_stays_and_where_it_comes(
    make: Callable[[], AbstractAsyncContextManager[BridgeWorld]], stays: bool
) -> None:
    """Its port may have been down meanwhile, which is no end."""

    async def body(world: BridgeWorld) -> None:
        fabric, nic = world.fabric, NicSpec(mac=NIC.mac, bridge="br0")
        fd = await fabric.plug(WEB, 0, nic)
        try:
            if stays:
                await fabric.prepare_departure(WEB, [nic], TUNNEL)
                await fabric.divert(WEB)
                await fabric.shut(WEB)
                await fabric.reopen(WEB, [nic])
            else:
                await fabric.prepare_arrival(WEB, [nic], TUNNEL)
                await fabric.open_arrival(WEB)
                fabric.announce_now(WEB)
            await says_its_address(fabric, fd, nic)
        finally:
            os.close(fd)

    run_in_world(make, body)


def test_an_agent_that_restarts_watches_what_runs() -> None:
    async def body(world: BridgeWorld) -> None:
        fd = await world.fabric.plug(WEB, 0, NIC)
        successor = BridgeFabric(gaps_s=())
        try:
            await successor.watch(WEB, [NIC])
            own = gratuitous_arp_reply(parse_mac(NIC.mac), ipaddress.IPv4Address("10.0.0.5"))
            os.write(fd, bytes(VNET_HEADER_BYTES) + own)

            async def learnt_it() -> bool:
                return list(successor.learnt(WEB, [NIC])) == [("10.0.0.5",)]

            await eventually(learnt_it)
        finally:
            await successor.close()
            os.close(fd)

    on_bridge(body)


def test_frames_that_are_too_long_for_the_way_are_told_from_those_that_are_not() -> None:
    token = b"12345678"

    async def body(world: BridgeWorld) -> None:
        async def heard() -> WidthReport:
            hearing = asyncio.create_task(world.fabric.hear_wide(NIC, token, 2.0))
            while not hearing.done():  # It listens some time after this has begun.
                for length in (wide_frames.SHORT_BYTES, sent_bytes):
                    world.far.send(wide_frames.frame_of(CLIENT, token, length))
                await asyncio.wait({hearing}, timeout=0.01)
            return hearing.result()

        sent_bytes = 1500
        assert await heard() == WidthReport(short=True, full=True)
        sent_bytes = 1400
        assert await heard() == WidthReport(short=True, full=False)
        await world.fabric.send_wide(NIC, token)

        async def arrived() -> bool:
            own = bytes([0x06])
            frames = [frame for _, frame in world.everything() if frame[6:7] == own]
            return [wide_frames.length_in(frame, token) for frame in frames][-2:] == [64, 1500]

        await eventually(arrived)
        wide = msgspec.structs.replace(NIC, mtu_bytes=9000)
        with pytest.raises(FabricError, match="takes no frame of 9000 bytes"):
            await world.fabric.send_wide(wide, token)

    on_bridge(body)
