"""The networks that the fabric contract runs in: one in memory, one of the kernel's.

The kernel's is a node and a switch in one namespace:

    guest ── tap ── br0 ── up0 ═══ up1 ── sw0 ── far0 ═══ far1 (we listen and speak here)
"""

from __future__ import annotations

import abc
import asyncio
import concurrent.futures
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
from netfabric.frames import announcements, gratuitous_arp_reply, parse_mac, rarp
from netfabric.link_table import link_named
from netfabric.macvtap import MacvtapFabric, MacvtapNetwork
from netfabric.macvtap.network import macvtaps, unplug
from netfabric.simulated import SimulatedFabric, SimulatedNetwork
from netfabric.taps import TAP_NAME
from netfabric.vxlan import Overlay, VxlanFabric
from tests.contract.namespaces import run_in_world, unshare_network

GAPS_S = (0.02, 0.03, 0.05)
SOON_S = 20.0
_SO_TIMESTAMPNS = 35


class World(abc.ABC):
    """A node with a bridge `br0` (MTU 1500), and the network beyond it."""

    fabric: FabricDriver

    def fit(self, nic: NicSpec) -> NicSpec:
        """The NIC as this world can have it: a routed one needs an address."""
        return nic

    def round_of(self, nic: NicSpec) -> Sequence[bytes]:
        """What one round of an announcement tells the network, as `heard` has it."""
        return announcements(nic)

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
        self.fabric: FabricDriver = BridgeFabric(gaps_s=GAPS_S)
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

    def everything(self) -> Sequence[tuple[int, bytes]]:
        self.arrivals("52:54:00:00:00:00")
        return self.frames

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
    """Which port each bridge has learnt the MAC on.

    A kernel that knows VLANs has entries for them beside, which a bridge without them never reads.
    """

    def look() -> dict[str, str]:
        with IPRoute() as route:
            names = {link["index"]: link.get_attr("IFLA_IFNAME") for link in route.get_links()}
            return {
                names[entry.get_attr("NDA_MASTER")]: names[entry["ifindex"]]
                for entry in route.fdb("dump")
                if entry.get_attr("NDA_LLADDR") == mac
                and entry.get_attr("NDA_MASTER") in names
                and entry.get_attr("NDA_VLAN") is None
            }

    return await asyncio.to_thread(look)


async def forwarding(*ports: str) -> None:
    """Wait until they do: a bridge enables a port when the kernel has noticed its carrier."""

    def look() -> bool:
        links = [link_named(name) for name in ports]
        return all(link is not None and link.forwarding for link in links)

    await eventually(lambda: asyncio.to_thread(look))


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
async def bridge_world(
    change: Callable[[], None] = lambda: None,
    make: Callable[[socket.socket], BridgeWorld] | None = None,
) -> AsyncIterator[BridgeWorld]:
    await asyncio.to_thread(make_network)
    await forwarding("up0", "up1", "far0")
    await asyncio.to_thread(change)
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3)) as far:
        far.bind(("far1", 3))
        far.setblocking(False)
        far.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
        world = (make or BridgeWorld)(far)
        try:
            with blockbuster_ctx(["netfabric"]):
                yield world
        finally:
            await world.fabric.close()


# --- VXLAN between two namespaces ------------------------------------------------------------


class VxlanWorld(BridgeWorld):
    """The far end is another node's VXLAN; `other` is a thread in that node's namespace."""

    def __init__(self, far: socket.socket, other: concurrent.futures.Executor) -> None:
        super().__init__(far)
        overlay = Overlay("br0", 77, "192.0.2.1", ("192.0.2.2",), mtu_bytes=1500)
        self.fabric = VxlanFabric(overlay, gaps_s=GAPS_S)
        self._other = other

    async def move_away(self, mac: str) -> None:
        self.far.send(rarp(parse_mac(mac)))

        async def gone() -> bool:
            return (await learnt(mac)).get("br0", "").startswith("fyo")

        await eventually(gone)

    async def is_here(self, mac: str) -> bool:
        port = (await learnt(mac)).get("br0", "")
        remote = await asyncio.wrap_future(self._other.submit(remote_of, mac))
        return TAP_NAME.fullmatch(port) is not None and remote == "192.0.2.1"


def remote_of(mac: str) -> str | None:
    """Where the VXLANs of this thread's namespace have the MAC."""
    with IPRoute() as route:
        for entry in route.fdb("dump"):
            if entry.get_attr("NDA_LLADDR") == mac:
                found: str | None = entry.get_attr("NDA_DST")
                return found
    return None


def make_far_node(near_namespace: int) -> socket.socket:
    """In a new namespace of the calling thread's: the other node, joined to the near one."""
    unshare_network()
    with IPRoute() as route:
        peer = {"ifname": "under0", "net_ns_fd": near_namespace}
        route.link("add", ifname="under1", kind="veth", peer=peer)
        (under,) = route.link_lookup(ifname="under1")
        route.addr("add", index=under, address="192.0.2.2", prefixlen=24)
        route.link("set", index=under, mtu=1600, state="up")
        route.link(
            "add",
            ifname="far1",
            kind="vxlan",
            vxlan_id=77,
            vxlan_port=4789,
            vxlan_local="192.0.2.2",
            vxlan_group="192.0.2.1",
        )
        (far_index,) = route.link_lookup(ifname="far1")
        route.link("set", index=far_index, mtu=1500, state="up")
    far = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
    far.bind(("far1", 3))
    return far


def make_near_underlay() -> None:
    with IPRoute() as route:
        (under,) = route.link_lookup(ifname="under0")
        route.addr("add", index=under, address="192.0.2.1", prefixlen=24)
        narrow_underlay(1600)
        route.link("set", index=under, state="up")


def narrow_underlay(mtu_bytes: int) -> None:
    """Of what leaves this node in the calling thread's namespace."""
    with IPRoute() as route:
        route.link("set", index=route.link_lookup(ifname="under0")[0], mtu=mtu_bytes)


@contextlib.asynccontextmanager
async def vxlan_world() -> AsyncIterator[VxlanWorld]:
    near = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    with concurrent.futures.ThreadPoolExecutor(1) as other, contextlib.ExitStack() as stack:
        stack.callback(os.close, near)
        far = stack.enter_context(await asyncio.wrap_future(other.submit(make_far_node, near)))
        await asyncio.to_thread(make_near_underlay)
        far.setblocking(False)
        far.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
        world = VxlanWorld(far, other)
        await world.fabric.open()
        try:
            with blockbuster_ctx(["netfabric"]):
                yield world
        finally:
            await world.fabric.close()


def run_vxlan(body: Callable[[VxlanWorld], Awaitable[None]]) -> None:
    run_in_world(vxlan_world, body)


# --- macvtap above an uplink -----------------------------------------------------------------


class MacvtapWorld(BridgeWorld):
    """No `br0`: the uplink is the guests' own, and the switch's is the only table."""

    def __init__(self, far: socket.socket) -> None:
        super().__init__(far)
        self.fabric = MacvtapFabric(MacvtapNetwork("br0", "up0"), gaps_s=GAPS_S)

    async def move_away(self, mac: str) -> None:
        await self.announce_elsewhere(mac)

    async def is_here(self, mac: str) -> bool:
        return (await learnt(mac)).get("sw0") == "up1"

    async def taps(self) -> int:
        return len(await asyncio.to_thread(macvtaps))


def free_uplink() -> None:
    with IPRoute() as route:
        route.link("set", index=route.link_lookup(ifname="up0")[0], master=0)
        route.link("del", index=route.link_lookup(ifname="br0")[0])


def remove_macvtaps() -> None:
    """With their nodes, which would outlive the namespace."""
    for link in macvtaps():
        unplug(link.name)


@contextlib.asynccontextmanager
async def macvtap_world() -> AsyncIterator[MacvtapWorld]:
    async with bridge_world(free_uplink, MacvtapWorld) as world:
        assert isinstance(world, MacvtapWorld)
        try:
            yield world
        finally:
            await asyncio.to_thread(remove_macvtaps)


def run_macvtap(body: Callable[[MacvtapWorld], Awaitable[None]], *, loopback: bool = False) -> None:
    run_in_world(macvtap_world, body, loopback=loopback)


def run_bridge(body: Callable[[BridgeWorld], Awaitable[None]], *, loopback: bool = False) -> None:
    run_in_world(bridge_world, body, loopback=loopback)
