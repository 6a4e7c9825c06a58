"""The networks that the fabric contract runs in: one in memory, one of the kernel's.

The kernel's is a node and a switch in one namespace:

    guest ── tap ── br0 ── up0 ═══ up1 ── sw0 ── far0 ═══ far1 (we listen and speak here)
"""

from __future__ import annotations

import abc
import asyncio
import contextlib
import ipaddress
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

from blockbuster import blockbuster_ctx
from pyroute2 import IPRoute

from migrator.model import DomainName, NicSpec, NodeName
from migrator.ports import FabricDriver
from netfabric.bridge import BridgeFabric, list_taps
from netfabric.frames import gratuitous_arp_reply, parse_mac, rarp
from netfabric.simulated import SimulatedFabric, SimulatedNetwork
from tests.contract.namespaces import run_in_new_namespace

GAPS_S = (0.02, 0.03, 0.05)
SOON_S = 20.0
_SO_TIMESTAMPNS = 35


class World(abc.ABC):
    """A node with a bridge `br0` (MTU 1500), and the network beyond it."""

    fabric: FabricDriver

    @abc.abstractmethod
    async def move_away(self, mac: str) -> None:
        """Make every table on the way say that the MAC is on another node."""

    @abc.abstractmethod
    async def is_here(self, mac: str) -> bool:
        """Whether every table on the way leads a frame for the MAC to this node's guest."""

    @abc.abstractmethod
    async def heard(self, mac: str) -> Sequence[bytes]:
        """The frames from this MAC that the rest of the network heard so far, in order."""

    @abc.abstractmethod
    async def taps(self) -> int: ...

    @abc.abstractmethod
    def hypervisor_died(self, domain: DomainName, fds: Sequence[int]) -> None: ...


Body = Callable[[World], Awaitable[None]]


async def eventually(condition: Callable[[], Awaitable[bool]]) -> None:
    """Wait until the condition holds; TimeoutError after SOON_S."""
    async with asyncio.timeout(SOON_S):
        while not await condition():  # noqa: ASYNC110 - the kernel sets no event
            await asyncio.sleep(0.005)


# --- simulated -------------------------------------------------------------------------------


class SimulatedWorld(World):
    def __init__(self) -> None:
        self.network = SimulatedNetwork()
        self.driver = SimulatedFabric(NodeName("here"), self.network, gaps_s=GAPS_S)
        self.fabric = self.driver

    async def move_away(self, mac: str) -> None:
        self.network.where[mac] = NodeName("elsewhere")

    async def is_here(self, mac: str) -> bool:
        return self.network.where.get(mac) == "here"

    async def heard(self, mac: str) -> Sequence[bytes]:
        return [one.frame for one in self.network.announcements if one.mac == mac]

    async def taps(self) -> int:
        return len(self.driver.plugged)

    def hypervisor_died(self, domain: DomainName, fds: Sequence[int]) -> None:
        for fd in fds:
            os.close(fd)
        self.driver.forget(domain)


def run_simulated(body: Body) -> None:
    async def run() -> None:
        world = SimulatedWorld()
        try:
            await body(world)
        finally:
            await world.fabric.close()

    asyncio.run(run())


# --- the kernel's bridge ---------------------------------------------------------------------


class BridgeWorld(World):
    def __init__(self, far: socket.socket) -> None:
        self.fabric = BridgeFabric(gaps_s=GAPS_S)
        self.far = far
        self.frames: list[tuple[int, bytes]] = []
        """Kernel's wall-clock time of arrival (ns), frame."""

    async def move_away(self, mac: str) -> None:
        self.far.send(rarp(parse_mac(mac)))

        async def gone() -> bool:
            return await learnt(mac) == {"br0": "up0", "sw0": "far0"}

        await eventually(gone)

    async def announce_elsewhere(self, mac: str) -> None:
        """As another node does it: the switch learns it, whatever this node's bridge believes."""
        self.far.send(rarp(parse_mac(mac)))

        async def learnt_there() -> bool:
            return (await learnt(mac)).get("sw0") == "far0"

        await eventually(learnt_there)

    async def answer_arp(self, nic: NicSpec) -> None:
        """Wait for a question for the NIC at the far end, and answer as its guest would."""
        loop, mac = asyncio.get_running_loop(), parse_mac(nic.mac)
        async with asyncio.timeout(SOON_S):
            while True:
                frame = await loop.sock_recv(self.far, 2048)
                if frame[:6] == mac and frame[12:14] == b"\x08\x06":
                    break
        address = ipaddress.IPv4Address(nic.addresses[0])
        reply = gratuitous_arp_reply(mac, address)
        self.far.send(frame[6:12] + reply[6:32] + frame[6:12] + bytes(4) + reply[42:])

    async def is_here(self, mac: str) -> bool:
        ports = await learnt(mac)
        return ports.get("br0", "").startswith("fy") and ports.get("sw0") == "up1"

    async def heard(self, mac: str) -> Sequence[bytes]:
        return [frame for _, frame in self.arrivals(mac)]

    def arrivals(self, mac: str) -> Sequence[tuple[int, bytes]]:
        with contextlib.suppress(BlockingIOError):
            while True:
                frame, control, _, _ = self.far.recvmsg(2048, 64)
                seconds, rest = (int.from_bytes(control[0][2][i : i + 8], "little") for i in (0, 8))
                self.frames.append((seconds * 1_000_000_000 + rest, frame))
        source = parse_mac(mac)
        return [(at_ns, frame) for at_ns, frame in self.frames if frame[6:12] == source]

    async def taps(self) -> int:
        return len(await list_taps())

    def hypervisor_died(self, domain: DomainName, fds: Sequence[int]) -> None:
        for fd in fds:
            os.close(fd)


async def learnt(mac: str) -> dict[str, str]:
    """Which port each bridge has learnt the MAC on."""

    def look() -> dict[str, str]:
        with IPRoute() as route:
            names = {link["index"]: link.get_attr("IFLA_IFNAME") for link in route.get_links()}
            return {
                names[entry.get_attr("NDA_MASTER")]: names[entry["ifindex"]]
                for entry in route.fdb("dump")
                if entry.get_attr("NDA_LLADDR") == mac and entry.get_attr("NDA_MASTER") in names
            }

    return await asyncio.to_thread(look)


def make_network() -> None:
    with IPRoute() as route:
        for bridge in ("br0", "sw0"):
            route.link("add", ifname=bridge, kind="bridge")
        route.link("add", ifname="up0", kind="veth", peer="up1")
        route.link("add", ifname="far0", kind="veth", peer="far1")
        index = {link.get_attr("IFLA_IFNAME"): link["index"] for link in route.get_links()}
        for port, bridge in (("up0", "br0"), ("up1", "sw0"), ("far0", "sw0")):
            route.link("set", index=index[port], master=index[bridge])
        for name in ("br0", "sw0", "up0", "up1", "far0", "far1"):
            route.link("set", index=index[name], state="up")


@contextlib.asynccontextmanager
async def bridge_world() -> AsyncIterator[BridgeWorld]:
    await asyncio.to_thread(make_network)
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3)) as far:
        far.bind(("far1", 3))
        far.setblocking(False)
        far.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
        world = BridgeWorld(far)
        try:
            with blockbuster_ctx(["netfabric"]):
                yield world
        finally:
            await world.fabric.close()


def run_bridge(body: Body) -> None:
    async def run() -> None:
        async with bridge_world() as world:
            await body(world)

    run_in_new_namespace(run)
