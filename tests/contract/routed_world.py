"""The routed world of the fabric contract: a node, and a router that is another namespace's.

    guest ── tap ── (this namespace) under0 ══════ under1 (the router, and a node beyond it)
                    192.0.2.1, 2001:db8:ff::1       192.0.2.2, 2001:db8:ff::2

The router is the one of `python -m netfabric.routes.netlink`, on an event loop in its own thread.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import ipaddress
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import TypeVar

import msgspec
from blockbuster import blockbuster_ctx
from pyroute2 import IPRoute

from migrator.model import DomainName, NicSpec
from netfabric.bridge import list_taps
from netfabric.host_routes import Metric, route_of, way_to
from netfabric.routed import RoutedFabric, RoutedNetwork
from netfabric.routes.netlink.driver import NetlinkRoutes
from netfabric.routes.netlink.messages import Claim, Claims
from netfabric.routes.netlink.speaker import Speaker, SpeakerSettings
from netfabric.taps import TAP_NAME
from tests.contract.fabric_worlds import GAPS_S, World
from tests.contract.namespaces import run_in_world, unshare_network

KEY = b"a key of the test's own"
NEAR, NEAR6 = "192.0.2.1", "2001:db8:ff::1"
FAR, FAR6 = "192.0.2.2", "2001:db8:ff::2"
NETWORK = RoutedNetwork("br0", (NEAR, NEAR6))
T = TypeVar("T")


class Router:
    """The far namespace: its thread runs one event loop, from `start` to `stop`."""

    def __init__(self) -> None:
        self._pool = concurrent.futures.ThreadPoolExecutor(1)
        self._loop: asyncio.AbstractEventLoop | None = None
        self.speaker: Speaker
        self.heard: list[Claims] = []

    async def start(self) -> None:
        near = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        try:
            await asyncio.wrap_future(self._pool.submit(make_far_end, near))
        finally:
            os.close(near)
        self._loop = await asyncio.wrap_future(self._pool.submit(asyncio.new_event_loop))
        self._pool.submit(self._loop.run_forever)
        self.speaker = Speaker(SpeakerSettings(listen=FAR, key=KEY))
        await self.do(self._open())

    async def _open(self) -> None:
        take = self.speaker._take

        async def noted(message: Claims, sender: tuple[str, int]) -> None:
            self.heard.append(message)
            await take(message, sender)

        self.speaker._take = noted  # type: ignore[method-assign]
        await self.speaker.open()

    async def do(self, work: Awaitable[T]) -> T:
        """Run it on the router's loop."""
        assert self._loop is not None

        async def run() -> T:
            return await work

        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(run(), self._loop))

    async def call(self, work: Callable[[], T]) -> T:
        """Run it in the router's namespace."""

        async def run() -> T:
            return await asyncio.to_thread(work)

        return await self.do(run())

    async def stop(self) -> None:
        await self.do(self.speaker.close())
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._loop.stop)
        await asyncio.to_thread(self._pool.shutdown)
        self._loop.close()


class RoutedWorld(World):
    def __init__(self, router: Router) -> None:
        self.router = router
        self.routes = NetlinkRoutes(
            SpeakerSettings(listen=NEAR, key=KEY, own_hops=NETWORK.local), (FAR,)
        )
        self.driver = RoutedFabric(NETWORK, self.routes, gaps_s=GAPS_S)
        self.fabric = self.driver
        self._addresses: dict[str, tuple[str, ...]] = {}

    def fit(self, nic: NicSpec) -> NicSpec:
        number = int(nic.mac[-2:], 16)
        return msgspec.structs.replace(nic, addresses=nic.addresses or (f"10.0.1.{number}",))

    def round_of(self, nic: NicSpec) -> Sequence[bytes]:
        return [address.encode() for address in self.addresses(nic.mac)]

    def addresses(self, mac: str) -> tuple[str, ...]:
        for nics in self.driver._plugged.values():
            for nic in nics.values():
                self._addresses[nic.mac] = nic.addresses
        return self._addresses.get(mac, ())

    async def move_away(self, mac: str) -> None:
        """Another node, beyond the router, claims the addresses."""
        claims = []
        for address in self.addresses(mac):
            hop = FAR if ipaddress.ip_address(address).version == 4 else FAR6
            sequence = self.router.speaker.ledger.next_sequence(address, hop)
            claims.append(Claim(address=address, sequence=sequence, hop=hop))
            self.router.speaker.ledger.take(claims[-1])
        _, silent = await self.router.do(self.router.speaker.ask(claims, [NEAR]))
        assert not silent

    async def is_here(self, mac: str) -> bool:
        addresses = [ipaddress.ip_address(text) for text in self.addresses(mac)]
        near = await asyncio.to_thread(lambda: [leads_to_tap(each) for each in addresses])
        found = await self.router.call(lambda: [route_of(each, Metric.TOLD) for each in addresses])
        hops = {str(hop.gateway) for hop in found if hop is not None}
        return all(near) and None not in found and hops <= {NEAR, NEAR6}

    async def heard(self, mac: str) -> Sequence[bytes]:
        own = self.addresses(mac)
        seen: set[int] = set()
        texts: list[bytes] = []
        for message in list(self.router.heard):
            if message.id not in seen:
                seen.add(message.id)
                texts += [each.address.encode() for each in message.claims if each.address in own]
        return texts

    async def taps(self) -> int:
        return len(await list_taps())

    def hypervisor_died(self, domain: DomainName, fds: Sequence[int]) -> None:
        for fd in fds:
            os.close(fd)


def leads_to_tap(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    """Whether this node's own table leads to a tap of it."""
    way = way_to(address)
    if way is None:
        return False
    with IPRoute() as route:
        (link,) = route.get_links(way.interface_index)
        return TAP_NAME.fullmatch(link.get_attr("IFLA_IFNAME")) is not None


def make_far_end(near_namespace: int) -> None:
    """In a new namespace of the calling thread's."""
    unshare_network()
    with IPRoute() as route:
        peer = {"ifname": "under0", "net_ns_fd": near_namespace}
        route.link("add", ifname="under1", kind="veth", peer=peer)
        (under,) = route.link_lookup(ifname="under1")
        route.addr("add", index=under, address=FAR, prefixlen=24)
        route.addr("add", index=under, address=FAR6, prefixlen=64, flags=0x02)
        route.link("set", index=under, state="up")


def make_near_end() -> None:
    with IPRoute() as route:
        (under,) = route.link_lookup(ifname="under0")
        route.addr("add", index=under, address=NEAR, prefixlen=24)
        route.addr("add", index=under, address=NEAR6, prefixlen=64, flags=0x02)
        route.link("set", index=under, state="up")
        route.link("set", index=1, state="up")


@contextlib.asynccontextmanager
async def routed_world() -> AsyncIterator[RoutedWorld]:
    router = Router()
    await router.start()
    try:
        await asyncio.to_thread(make_near_end)
        world = RoutedWorld(router)
        await world.fabric.open()
        try:
            with blockbuster_ctx(["netfabric"]):
                yield world
        finally:
            await world.fabric.close()
    finally:
        await router.stop()


def run_routed(body: Callable[[RoutedWorld], Awaitable[None]]) -> None:
    run_in_world(routed_world, body)
