"""A routed domain that moves, as the kernel's routing tables see it."""

from __future__ import annotations

import asyncio
import ipaddress
import os
import socket
import struct
from collections.abc import Awaitable, Sequence
from pathlib import Path

import msgspec
import pytest
from pyroute2 import IPRoute

from migrator.errors import FabricError
from migrator.model import DomainName, NicSpec
from migrator.ports import Tunnel, WidthReport
from netfabric.bridge.links import index_of
from netfabric.frames import ethernet, neighbour_solicitation, parse_mac
from netfabric.host_routes import Hop, Metric, route_of, set_neighbour, set_route, way_to
from netfabric.routed import RoutedFabric, RoutedNetwork, moving
from netfabric.routes.nobody import NobodyRoutes
from netfabric.taps import VNET_HEADER_BYTES, host_side_mac, made_mac, tunnel_name
from node_agent.doctor.findings import Level
from node_agent.doctor.links import check_routed
from tests.contract.fabric_worlds import SOON_S, eventually
from tests.contract.moving_guest import guest_frames, says_its_address
from tests.contract.routed_world import (
    FAR,
    FAR6,
    NEAR,
    NEAR6,
    NETWORK,
    RoutedWorld,
    leads_to_tap,
    run_routed,
)

pytestmark = pytest.mark.lab

WEB = DomainName("web")
ADDRESS, ADDRESS6 = ipaddress.ip_address("10.0.0.5"), ipaddress.ip_address("2001:db8::5")
NIC = NicSpec(mac="52:54:00:aa:bb:cc", bridge="br0", addresses=(str(ADDRESS), str(ADDRESS6)))
MAC = parse_mac(NIC.mac)
TUNNEL = Tunnel(name="m1", local=NEAR, remote=FAR, port=7782)
PORT = 9


def numbers(fd: int) -> list[int]:
    """The numbers of the test's datagrams (IPv4, UDP) that wait in a tap, in order."""
    frames = guest_frames(fd)
    udp = [each for each in frames if each[12:14] == b"\x08\x00" and each[23] == 17]
    return [each[42] for each in udp if struct.unpack_from("!H", each, 36)[0] == PORT]


async def numbers_until(fd: int, last: int) -> list[int]:
    found: list[int] = []

    async def arrived() -> bool:
        found.extend(numbers(fd))
        return last in found

    await eventually(arrived)
    return found


def send(*sent: int) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        sender.bind((FAR, 0))
        for number in sent:
            sender.sendto(bytes([number]), (str(ADDRESS), PORT))


def test_a_guest_is_answered_for_everybody_by_its_tap() -> None:
    """ARP for an address beyond a router, neighbour discovery for the router every guest has."""

    async def body(world: RoutedWorld) -> None:
        await asyncio.to_thread(set_default_route)
        fd = await world.fabric.plug(WEB, 0, NIC)
        try:
            own = host_side_mac(MAC)
            questions = (
                arp_question(ipaddress.IPv4Address("198.51.100.7")),
                neighbour_solicitation(MAC, own, ipaddress.IPv6Address("fe80::1")),
            )
            found: list[bytes] = []

            async def answered() -> bool:
                """Asks again, as guests do: a tap listens for fe80::1 when a kworker came to it."""
                for question in questions:
                    os.write(fd, bytes(VNET_HEADER_BYTES) + question)
                found.extend(guest_frames(fd))
                arp = [each for each in found if each[12:14] == b"\x08\x06" and each[21] == 2]
                advertised = [
                    each for each in found if each[12:14] == b"\x86\xdd" and each[54] == 136
                ]
                return any(each[22:28] == own for each in arp) and bool(advertised)

            await eventually(answered)
        finally:
            os.close(fd)

    run_routed(body)


def arp_question(target: ipaddress.IPv4Address) -> bytes:
    """As the guest asks it: RFC 826."""
    body = struct.pack(
        "!HHBBH6s4s6s4s", 1, 0x0800, 6, 4, 1, MAC, ADDRESS.packed, b"", target.packed
    )
    return ethernet(b"\xff" * 6, MAC, 0x0806, body)


def set_default_route() -> None:
    with IPRoute() as route:
        route.route("add", dst="0.0.0.0/0", gateway=FAR)


def test_what_comes_for_a_guest_on_its_way_waits_in_its_tap() -> None:
    async def body(world: RoutedWorld) -> None:
        fd = await world.fabric.plug(WEB, 0, NIC)
        try:
            await world.fabric.prepare_arrival(WEB, [NIC], TUNNEL)
            guest_frames(fd)
            assert not await asyncio.to_thread(leads_to_tap, ADDRESS), "nothing leads there yet"
            await world.router.call(make_other_end)
            await world.fabric.open_arrival(WEB)
            assert await asyncio.to_thread(leads_to_tap, ADDRESS)
            await world.router.call(lambda: send(1, 2, 3))
            assert await numbers_until(fd, 3) == [1, 2, 3]
            at_s = world.fabric.announce_now(WEB)
            assert at_s is not None

            async def here() -> bool:
                return await world.is_here(NIC.mac)

            await eventually(here)
            assert await world.fabric.end_arrival(WEB) >= 3
            assert await asyncio.to_thread(leads_to_tap, ADDRESS)
        finally:
            os.close(fd)

    run_routed(body)


def make_other_end() -> None:
    """As the old node's: the address leads into the tunnel."""
    name = tunnel_name(WEB, 0)
    back = Tunnel(name="m1", local=FAR, remote=NEAR, port=7782)
    index = moving._open_end(name, back, 0, NIC, moving._AWAY)
    set_neighbour(ADDRESS, index, made_mac(f"{name}/{moving._HERE}"))
    set_route(ADDRESS, Hop(index), Metric.HERE)


def tunnels_here() -> list[str]:
    with IPRoute() as route:
        names = [link.get_attr("IFLA_IFNAME") for link in route.get_links()]
        return [name for name in names if name.startswith("fx")]


def interface_towards_guest() -> str:
    way = way_to(ADDRESS)
    assert way is not None
    with IPRoute() as route:
        (link,) = route.get_links(way.interface_index)
        name: str = link.get_attr("IFLA_IFNAME")
        return name


@pytest.mark.parametrize("restarted", [False, True])
def test_a_guest_that_stays_has_everything_back(restarted: bool) -> None:
    async def body(world: RoutedWorld) -> None:
        fd = await world.fabric.plug(WEB, 0, NIC)
        fabric: RoutedFabric = world.driver
        try:
            await fabric.announce(WEB, [NIC])
            await fabric.announce(WEB, ())
            await fabric.prepare_departure(WEB, [NIC], TUNNEL)
            assert (await asyncio.to_thread(interface_towards_guest)).startswith("fy")
            await fabric.divert(WEB)
            assert (await asyncio.to_thread(interface_towards_guest)).startswith("fx")
            await fabric.shut(WEB)
            if restarted:
                fabric = RoutedFabric(NETWORK, NobodyRoutes(), gaps_s=())
                await fabric.open()
                assert await asyncio.to_thread(tunnels_here) == []
            await fabric.reopen(WEB, [NIC])
            assert (await asyncio.to_thread(interface_towards_guest)).startswith("fy")
            await world.router.call(lambda: send(1, 2))
            assert await numbers_until(fd, 2) == [1, 2]
            assert await asyncio.to_thread(tunnels_here) == []
            if not restarted:
                await says_its_address(fabric, fd, NIC)
        finally:
            if restarted:
                await fabric.close()
            os.close(fd)

    run_routed(body)


class UnpreparedRoutes(NobodyRoutes):
    async def prepare(self, addresses: Sequence[str]) -> None:
        raise FabricError("routes: nobody answers")


def test_routers_that_are_not_prepared_are_named_and_keep_no_frame_away() -> None:
    async def body(world: RoutedWorld) -> None:
        fabric = RoutedFabric(NETWORK, UnpreparedRoutes(), gaps_s=())
        fd = await fabric.plug(WEB, 0, NIC)
        try:
            with pytest.raises(FabricError, match=r"^the routers aren't prepared: routes: nobody"):
                await fabric.prepare_arrival(WEB, [NIC], TUNNEL)
            assert await asyncio.to_thread(tunnels_here) == [tunnel_name(WEB, 0)]
            await fabric.open_arrival(WEB)
            assert (await asyncio.to_thread(interface_towards_guest)).startswith("fy")
        finally:
            await fabric.close()
            os.close(fd)

    run_routed(body)


def test_the_old_way_ends_when_the_new_one_is_seen_and_not_before() -> None:
    async def body(world: RoutedWorld) -> None:
        fd = await world.fabric.plug(WEB, 0, NIC)
        await world.fabric.announce(WEB, [NIC])
        await world.fabric.announce(WEB, ())
        await world.fabric.prepare_departure(WEB, [NIC], TUNNEL)
        await world.fabric.divert(WEB)
        await world.fabric.shut(WEB)
        assert world.addresses(NIC.mac) == NIC.addresses
        os.close(fd)
        await world.fabric.unplug(WEB, 0)
        ending = asyncio.create_task(world.fabric.end_departure(WEB))
        try:
            await asyncio.wait({ending}, timeout=0.6)
            assert not ending.done(), "no router leads elsewhere yet"
            assert (await asyncio.to_thread(interface_towards_guest)).startswith("fx")
            assert await world.router.call(lambda: route_of(ADDRESS, Metric.TOLD)) is not None
            await world.move_away(NIC.mac)
            assert await asyncio.wait_for(ending, SOON_S) >= 0
            told = await asyncio.to_thread(route_of, ADDRESS, Metric.TOLD)
            assert told is not None
            assert str(told.gateway) == FAR
            assert await asyncio.to_thread(tunnels_here) == []
        finally:
            ending.cancel()

    run_routed(body)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"addresses": ()}, "has no addresses; a routed NIC needs them"),
        ({"vlan": 7}, "a routed network has none"),
        ({"bridge": "br9"}, "its network is called br0"),
        ({"mtu_bytes": 9000}, "under0 has an MTU of 1500 bytes"),
        ({"mac": "01:00:5e:00:00:01"}, "multicast"),
    ],
)
def test_what_a_routed_node_cannot_carry_is_refused(
    changed: dict[str, object], reason: str
) -> None:
    async def body(world: RoutedWorld) -> None:
        nic = msgspec.structs.replace(NIC, **changed)
        reasons = await world.fabric.check(nic)
        assert any(reason in each for each in reasons), reasons
        with pytest.raises(FabricError, match=reason):
            await world.fabric.plug(WEB, 0, nic)
        assert await world.taps() == 0

    run_routed(body)


def test_an_address_of_a_version_that_the_node_lacks_is_refused() -> None:
    async def body(world: RoutedWorld) -> None:
        network = RoutedNetwork("br0", (NEAR,))
        fabric = RoutedFabric(network, NobodyRoutes(), gaps_s=())
        assert any("no IPv6 address" in each for each in await fabric.check(NIC))
        await fabric.close()

    run_routed(body)


def test_a_guest_that_says_an_address_does_not_get_its_route() -> None:
    async def body(world: RoutedWorld) -> None:
        fd = await world.fabric.plug(WEB, 0, NIC)
        try:
            stolen = msgspec.structs.replace(NIC, addresses=(*NIC.addresses, "10.0.0.66"))
            await world.fabric.announce(WEB, [stolen])
            target = ipaddress.ip_address("10.0.0.66")
            assert await world.router.call(lambda: route_of(target, Metric.TOLD)) is None
            assert not await asyncio.to_thread(leads_to_tap, target)
        finally:
            os.close(fd)

    run_routed(body)


class Gate:
    """Who comes to it waits there until it is opened."""

    def __init__(self) -> None:
        self.reached, self.opened = asyncio.Event(), asyncio.Event()

    async def pass_through(self) -> None:
        self.reached.set()
        await self.opened.wait()

    async def runs_into(self, late: Awaitable[int], next_move: Awaitable[None]) -> None:
        """The next move begins while the earlier one's end stands at the gate."""
        ending = asyncio.ensure_future(late)
        await self.reached.wait()
        beginning = asyncio.ensure_future(next_move)
        await asyncio.wait({beginning}, timeout=0.5)  # Time enough for what must not happen.
        self.opened.set()
        await asyncio.gather(ending, beginning)


class SlowRoutes(NobodyRoutes):
    def __init__(self, gate: Gate) -> None:
        self.gate = gate
        self.told: list[str] = []

    async def prepare(self, addresses: Sequence[str]) -> None:
        self.told.append("prepare")

    async def withdraw(self, addresses: Sequence[str]) -> None:
        await self.gate.pass_through()
        self.told.append("withdraw")


def test_a_guest_that_comes_back_as_its_forwarding_ends_keeps_its_tunnel_and_its_routes() -> None:
    async def body(world: RoutedWorld) -> None:
        gate = Gate()
        routes = SlowRoutes(gate)
        fabric = RoutedFabric(NETWORK, routes, gaps_s=())
        fd = await fabric.plug(WEB, 0, NIC)
        try:
            await fabric.prepare_departure(WEB, [NIC], TUNNEL)
            coming = fabric.prepare_arrival(WEB, [NIC], msgspec.structs.replace(TUNNEL, name="m2"))
            await gate.runs_into(fabric.end_departure(WEB), coming)
            assert routes.told == ["withdraw", "prepare"]
            assert await asyncio.to_thread(index_of, tunnel_name(WEB, 0)) is not None
        finally:
            os.close(fd)
            await fabric.close()

    run_routed(body)


def test_a_guest_that_leaves_again_as_its_arrival_ends_keeps_its_tunnel(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def body(world: RoutedWorld) -> None:
        gate, fabric = Gate(), world.driver
        fd = await fabric.plug(WEB, 0, NIC)
        try:
            await fabric.prepare_arrival(WEB, [NIC], TUNNEL)
            discard = fabric._first.discard

            async def late(domain: DomainName) -> None:
                await gate.pass_through()
                await discard(domain)

            monkeypatch.setattr(fabric._first, "discard", late)
            away = fabric.prepare_departure(WEB, [NIC], msgspec.structs.replace(TUNNEL, name="m2"))
            await gate.runs_into(fabric.end_arrival(WEB), away)
            assert await asyncio.to_thread(index_of, tunnel_name(WEB, 0)) is not None
        finally:
            os.close(fd)

    run_routed(body)


def set_mtu(name: str, mtu_bytes: int) -> None:
    with IPRoute() as route:
        route.link("set", index=route.link_lookup(ifname=name)[0], mtu=mtu_bytes)


def test_routers_that_are_too_narrow_are_told_from_those_that_are_not() -> None:
    async def body(world: RoutedWorld) -> None:
        fabric, four = world.driver, msgspec.structs.replace(NIC, addresses=(str(ADDRESS),))
        assert (await fabric.hear_wide(NIC, b"12345678", 0.1)).hops == (NEAR, NEAR6)
        wide = WidthReport(short=True, full=True)
        assert await fabric.measure_width(NIC, (FAR, FAR6), 5.0) == wide
        await world.router.call(lambda: set_mtu("under1", 1400))
        narrow = WidthReport(short=True, full=False)
        assert await fabric.measure_width(NIC, (FAR, FAR6), 1.0) == narrow
        assert await fabric.measure_width(four, (FAR, FAR6), 1.0) == narrow
        for mtu_bytes in (1399, 1400):
            smaller = msgspec.structs.replace(NIC, mtu_bytes=mtu_bytes)
            assert await fabric.measure_width(smaller, (FAR, FAR6), 5.0) == wide
        silent = ("192.0.2.77",)
        assert await fabric.measure_width(four, silent, 0.2) == WidthReport(), "nothing is proved"

    run_routed(body)


def test_the_doctor_looks_at_a_routed_node() -> None:
    async def body(world: RoutedWorld) -> None:
        fine = await asyncio.to_thread(check_routed, NETWORK.local)
        assert [each.level for each in fine] == [Level.OK, Level.OK]
        assert "under0" in fine[0].detail
        wrong = (await asyncio.to_thread(check_routed, ["192.0.2.77"]))[0]
        assert wrong.level is Level.FAILURE
        assert "192.0.2.77" in wrong.mend
        await asyncio.to_thread(lambda: Path("/proc/sys/net/ipv4/ip_forward").write_text("0"))
        off = await asyncio.to_thread(check_routed, [NEAR])
        assert [each.level for each in off] == [Level.OK, Level.WARNING]

    run_routed(body)
