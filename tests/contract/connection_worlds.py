"""The worlds of connection tracking's contract: simulated, and one routed node of the kernel's.

Its rules accept only connections that it knows:

    client ns, 10.1.0.2 ── veth ── (this namespace) ── veth ── guest ns, 10.0.0.5
"""

from __future__ import annotations

import abc
import asyncio
import concurrent.futures
import contextlib
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

from blockbuster import blockbuster_ctx
from pyroute2 import IPRoute

from migrator.ports import Connection, ConnectionTracker
from netfabric import filters
from netfabric.connections import KernelConnections
from netfabric.simulated.connections import SimulatedConnections
from tests.contract.fabric_worlds import eventually
from tests.contract.namespaces import run_in_world, unshare_network

GUEST, CLIENT = "10.0.0.5", "10.1.0.2"
GUEST6, CLIENT6 = "2001:db8::5", "2001:db8:1::2"
RULES = """
table inet stateful {
  chain forward {
    type filter hook forward priority 0; policy accept;
    ct state established,related accept
    tcp flags & (syn | ack) == syn ct state new accept
    icmpv6 type { nd-neighbor-solicit, nd-neighbor-advert } accept
    meta l4proto tcp counter drop
  }
}
"""


class World(abc.ABC):
    tracker: ConnectionTracker

    @abc.abstractmethod
    async def connect(self, guest: str = GUEST) -> None:
        """A connection of the client's to the guest begins."""


class SimulatedWorld(World):
    def __init__(self) -> None:
        self.memory = SimulatedConnections()
        self.tracker = self.memory
        self._number = 0

    async def connect(self, guest: str = GUEST) -> None:
        self._number += 1
        entry = f"{CLIENT} {guest} {self._number}"
        self.memory.known.add(Connection(version=4, entry=entry.encode()))


class KernelWorld(World):
    """`guest` and `client` are threads in their namespaces."""

    def __init__(
        self, guest: concurrent.futures.Executor, client: concurrent.futures.Executor
    ) -> None:
        self.kernel = KernelConnections()
        self.tracker = self.kernel
        self._guest, self._client = guest, client
        self._opened: list[socket.socket] = []

    async def listen(self, version: int = 4) -> socket.socket:
        family = socket.AF_INET if version == 4 else socket.AF_INET6
        address = GUEST if version == 4 else GUEST6
        listener: socket.socket = await self.in_guest(
            lambda: socket.create_server((address, 0), family=family)
        )
        self._opened.append(listener)
        return listener

    async def pair(self, listener: socket.socket) -> tuple[socket.socket, socket.socket]:
        """The client's end of a new connection, and the guest's."""
        target = listener.getsockname()[:2]
        near = await self.in_client(lambda: socket.create_connection(target, 10.0))
        far = await asyncio.to_thread(lambda: listener.accept()[0])
        self._opened += [near, far]
        return near, far

    async def wait_links(self) -> None:
        """Until the kernel has noticed that both links have a carrier: IPv6 waits for it."""

        def states() -> set[str]:
            with IPRoute() as route:
                names = ("guest0", "client0")
                links = [route.link("get", ifname=name)[0] for name in names]
            return {link.get_attr("IFLA_OPERSTATE") for link in links}

        async def up() -> bool:
            return await asyncio.to_thread(states) == {"UP"}

        await eventually(up)

    async def connect(self, guest: str = GUEST) -> None:
        if guest == GUEST:
            await self.pair(await self.listen())

    async def in_guest(self, work: Callable[[], Any]) -> Any:
        return await asyncio.wrap_future(self._guest.submit(work))

    async def in_client(self, work: Callable[[], Any]) -> Any:
        return await asyncio.wrap_future(self._client.submit(work))

    async def dropped(self) -> int:
        """How many packets of unknown connections the rules have dropped."""
        text = await asyncio.to_thread(filters.run, "list chain inet stateful forward", "test")
        return int(text.rpartition("packets ")[2].split()[0])

    def close(self) -> None:
        for opened in self._opened:
            opened.close()


def make_end(near: int, link: str, address: str, address6: str) -> None:
    """A namespace of the calling thread's, joined to the node's by a veth."""
    unshare_network()
    with IPRoute() as route:
        peer = {"ifname": link, "net_ns_fd": near}
        route.link("add", ifname="eth0", kind="veth", peer=peer)
        (index,) = route.link_lookup(ifname="eth0")
        route.addr("add", index=index, address=address, prefixlen=24)
        route.addr("add", index=index, address=address6, prefixlen=64, flags=0x02)
        route.link("set", index=index, state="up")
        route.link("set", index=1, state="up")


def make_default(gateway: str, gateway6: str) -> None:
    """After the node's end is up."""
    with IPRoute() as route:
        route.route("add", dst="0.0.0.0/0", gateway=gateway)
        route.route("add", dst="::/0", gateway=gateway6, family=socket.AF_INET6)


def make_node() -> None:
    settings = Path("/proc/sys/net")
    with IPRoute() as route:
        for link, address, address6 in (
            ("guest0", "10.0.0.1", "2001:db8::1"),
            ("client0", "10.1.0.1", "2001:db8:1::1"),
        ):
            (index,) = route.link_lookup(ifname=link)
            # It asks for neighbours by its link-local address, so that must be valid at once.
            (settings / f"ipv6/conf/{link}/accept_dad").write_text("0")
            route.addr("add", index=index, address=address, prefixlen=24)
            route.addr("add", index=index, address=address6, prefixlen=64, flags=0x02)
            route.link("set", index=index, state="up")
    for setting in ("ipv4/ip_forward", "ipv6/conf/all/forwarding"):
        (settings / setting).write_text("1")
    filters.run(RULES, "test")
    (settings / "netfilter/nf_conntrack_tcp_loose").write_text("0")


@contextlib.asynccontextmanager
async def kernel_world() -> AsyncIterator[KernelWorld]:
    near = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    with (
        concurrent.futures.ThreadPoolExecutor(1) as guest,
        concurrent.futures.ThreadPoolExecutor(1) as client,
    ):
        world = KernelWorld(guest, client)
        try:
            await world.in_guest(lambda: make_end(near, "guest0", GUEST, GUEST6))
            await world.in_client(lambda: make_end(near, "client0", CLIENT, CLIENT6))
            await asyncio.to_thread(make_node)
            await world.in_guest(lambda: make_default("10.0.0.1", "2001:db8::1"))
            await world.in_client(lambda: make_default("10.1.0.1", "2001:db8:1::1"))
            with blockbuster_ctx(["netfabric"]):
                yield world
        finally:
            await world.tracker.close()
            world.close()
            os.close(near)


Body = Callable[[World], Awaitable[None]]


def on_kernel(body: Callable[[KernelWorld], Awaitable[None]]) -> None:
    run_in_world(kernel_world, body)
