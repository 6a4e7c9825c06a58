"""Two nodes of one fabric driver, each in a network namespace of its own, and the way between.

    near: fabric ── under0 192.0.2.1 ═══ 192.0.2.2 under1 ── far: fabric
          guests' network "br0"                guests' network "br0" ── up0 ═══ up1 (we listen)

The way between is as wide as a NIC, so a full frame crosses it in two fragments.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import os
import re
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TypeVar

from pyroute2 import IPRoute

from migrator.model import NodeName
from migrator.ports import FabricDriver, Tunnel
from netfabric import filters
from netfabric.bridge import BridgeFabric
from netfabric.macvtap import MacvtapFabric, MacvtapNetwork
from netfabric.routed import RoutedFabric, RoutedNetwork
from netfabric.routes.nobody import NobodyRoutes
from netfabric.simulated import SimulatedFabric, SimulatedNetwork
from netfabric.vxlan import Overlay, VxlanFabric
from netfabric.vxlan.overlay import OVERHEAD_BYTES
from tests.contract.fabric_worlds import forwarding, remove_macvtaps
from tests.contract.namespaces import unshare_network

NEAR, FAR = "192.0.2.1", "192.0.2.2"
T = TypeVar("T")


def fabric_of(driver: str, own: str, other: str) -> FabricDriver:
    """One of the kernel's, whose guests' network is called br0."""
    match driver:
        case "bridge":
            return BridgeFabric(gaps_s=())
        case "vxlan":
            return VxlanFabric(Overlay("br0", 77, own, (other,), mtu_bytes=1500), gaps_s=())
        case "macvtap":
            return MacvtapFabric(MacvtapNetwork("br0", "up0"), gaps_s=())
        case "routed":
            return RoutedFabric(RoutedNetwork("br0", (own,)), NobodyRoutes(), gaps_s=())
    raise AssertionError(driver)


class OtherNode:
    """A namespace whose event loop runs in a thread of its own, from `start` to `stop`."""

    def __init__(self) -> None:
        self._pool = concurrent.futures.ThreadPoolExecutor(1)
        self._loop: asyncio.AbstractEventLoop | None = None

    async def start(self) -> None:
        near = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        try:
            await asyncio.wrap_future(self._pool.submit(_join, near))
        finally:
            os.close(near)
        self._loop = await asyncio.wrap_future(self._pool.submit(asyncio.new_event_loop))
        self._pool.submit(self._loop.run_forever)

    async def do(self, work: Callable[[], Awaitable[T]]) -> T:
        """Run it on the node's loop."""
        assert self._loop is not None

        async def run() -> T:
            return await work()

        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(run(), self._loop))

    async def call(self, work: Callable[[], T]) -> T:
        """Run it in a thread of the node's."""
        return await self.do(lambda: asyncio.to_thread(work))

    async def stop(self) -> None:
        assert self._loop is not None
        await self.do(self._loop.shutdown_default_executor)
        self._loop.call_soon_threadsafe(self._loop.stop)
        await asyncio.to_thread(self._pool.shutdown)
        self._loop.close()


class Pair:
    """Both nodes' fabrics. `there` runs what is the far one's."""

    def __init__(self, near: FabricDriver, far: FabricDriver, other: OtherNode | None) -> None:
        self.near = near
        self.far = far
        self._other = other
        self.out = Tunnel(name="m1", local=NEAR, remote=FAR, port=7782)
        self.back = Tunnel(name="m1", local=FAR, remote=NEAR, port=7782)
        self.network: SimulatedNetwork | None = None

    async def there(self, work: Callable[[], Awaitable[T]]) -> T:
        return await (work() if self._other is None else self._other.do(work))

    async def filter(self, hook: str, rule: str) -> None:
        """At the far node."""
        assert self._other is not None
        chain = f"chain c {{ type filter hook {hook}; {rule}; }}"
        text = f"table inet test {{ {chain}; }}"
        await self._other.call(lambda: filters.run(text, "test"))

    async def dropped(self) -> int:
        """Packets that the filter has counted so far."""
        assert self._other is not None
        listed = await self._other.call(lambda: filters.run("list table inet test", "test"))
        found = re.search(r"counter packets (\d+)", listed)
        return int(found[1]) if found else 0

    async def listen(self) -> socket.socket:
        """To what leaves the far node by its uplink."""
        assert self._other is not None
        opened = await self._other.call(
            lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
        )
        opened.setblocking(False)
        opened.bind(("up1", 3))
        return opened


@contextlib.asynccontextmanager
async def two_nodes(driver: str) -> AsyncIterator[Pair]:
    """Within a new namespace, which is the near node's."""
    if driver == "simulated":
        network = SimulatedNetwork()
        made = [SimulatedFabric(NodeName(name), network) for name in ("near", "far")]
        pair = Pair(made[0], made[1], None)
        pair.network = network
        yield pair
        return
    other = OtherNode()
    await other.start()
    try:
        await asyncio.to_thread(_make_node, NEAR, "under0", driver)
        await other.call(lambda: _make_node(FAR, "under1", driver))
        if driver == "bridge":
            await forwarding("up0")
            await other.do(lambda: forwarding("up0"))
        pair = Pair(fabric_of(driver, NEAR, FAR), fabric_of(driver, FAR, NEAR), other)
        await pair.near.open()
        await pair.there(pair.far.open)
        try:
            yield pair
        finally:
            await pair.near.close()
            await pair.there(pair.far.close)
            await asyncio.to_thread(remove_macvtaps)
            await other.call(remove_macvtaps)
    finally:
        await other.stop()


def _join(near_namespace: int) -> None:
    unshare_network()
    with IPRoute() as route:
        peer = {"ifname": "under0", "net_ns_fd": near_namespace}
        route.link("add", ifname="under1", kind="veth", peer=peer)


def _make_node(address: str, under: str, driver: str) -> None:
    with IPRoute() as route:
        (index,) = route.link_lookup(ifname=under)
        if driver == "vxlan":  # Else it wouldn't carry the guests' 1500 with a VXLAN's headers.
            route.link("set", index=index, mtu=1500 + OVERHEAD_BYTES[4])
        route.addr("add", index=index, address=address, prefixlen=24)
        route.link("set", index=index, state="up")
        route.link("set", index=1, state="up")
        route.link("add", ifname="up0", kind="veth", peer="up1")
        ports = [route.link_lookup(ifname=name)[0] for name in ("up0", "up1")]
        if driver == "bridge":
            route.link("add", ifname="br0", kind="bridge")
            (bridge,) = route.link_lookup(ifname="br0")
            route.link("set", index=bridge, state="up")
            route.link("set", index=ports[0], master=bridge)
        for port in ports:
            route.link("set", index=port, state="up")
