"""Host routes by real FRR daemons on two nodes, by plain BGP and by EVPN (type 5).

guest ── port0 ── under0 ═══════ under1 ── port0 ── guest
         zebra, bgpd                zebra, bgpd
         192.0.2.1                  192.0.2.2
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import ipaddress
import os
import subprocess
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

import pytest
from pyroute2 import IPRoute

from deploy.lab.frr import SYSTEM
from migrator.errors import FabricError
from netfabric.host_routes import Hop, Metric, remove_route, set_route, way_to
from netfabric.routed import RoutedNetwork
from netfabric.routed.network import prepare_node
from netfabric.routed.overlay_probing import plain, router_mac
from netfabric.routes.frr.driver import FrrRoutes
from netfabric.routes.frr.vtysh import Vtysh
from netfabric.vxlan.overlay import Overlay
from tests.contract.fabric_worlds import eventually
from tests.contract.frr_world import a_folder, configuration, end, start_daemons
from tests.contract.namespaces import run_in_new_namespace
from tests.contract.routed_world import FAR, NEAR, make_far_end, make_near_end

pytestmark = pytest.mark.lab

T = TypeVar("T")
GUEST = ("10.0.0.5", "2001:db8::5")
ADDRESSES = tuple(map(ipaddress.ip_address, GUEST))
NETWORK = 5000


def configured(address: str, neighbour: str, identifier: int | None) -> str:
    if identifier is None:
        return configuration(address, neighbour, {"ipv4 unicast": [], "ipv6 unicast": []})
    evpn = {"l2vpn evpn": ["advertise-all-vni", "advertise ipv4 unicast"]}
    return configuration(address, neighbour, evpn, identifier=identifier)


class Node:
    """One of the two: what it is asked is done in its namespace."""

    def __init__(self, address: str, folder: Path, identifier: int | None) -> None:
        self.address = address
        self.folder = folder
        self.routes = FrrRoutes(folder, identifier)
        self.vtysh = Vtysh(folder)
        overlay = None
        if identifier:
            overlay = Overlay("guests", identifier, address, (), mtu_bytes=1450, evpn=True)
        self.network = RoutedNetwork("guests", (address,), overlay=overlay)
        self._identifier = identifier
        self._executor = concurrent.futures.ThreadPoolExecutor(1)
        self._daemons: list[subprocess.Popen[bytes]] = []
        self._port = 0

    async def do(self, work: Callable[[], T]) -> T:
        return await asyncio.wrap_future(self._executor.submit(work))

    async def start(self, neighbour: str) -> None:
        await self.do(lambda: prepare_node(self.network))
        await self.do(self._make_port)
        await self.start_daemons(neighbour)

    async def start_daemons(self, neighbour: str) -> None:
        text = configured(self.address, neighbour, self._identifier)
        self._daemons = await self.do(lambda: start_daemons(self.folder, text))

    async def stop_daemons(self) -> None:
        await asyncio.to_thread(end, self._daemons)

    def _make_port(self) -> None:
        with IPRoute() as route:
            route.link("add", ifname="port0", kind="veth", peer="port1")
            for name in ("port1", "port0"):
                (self._port,) = route.link_lookup(ifname=name)
                route.link("set", index=self._port, state="up")

    async def open_port(self) -> None:
        for address in ADDRESSES:
            await self.do(partial(set_route, address, Hop(self._port), Metric.HERE))

    async def close_port(self) -> None:
        for address in ADDRESSES:
            await self.do(partial(remove_route, address, Metric.HERE))

    async def leads_to(self, node: Node) -> bool:
        """This node's kernel does, with both addresses."""
        ways = [await self.do(partial(way_to, address)) for address in ADDRESSES]
        if self is node:
            return all(way is not None and way.interface_index == self._port for way in ways)
        if self._identifier is None:  # By IPv6 the next hop is a link-local address.
            return all(way is not None and way.interface_index != self._port for way in ways)
        hops = {plain(str(way.gateway)) for way in ways if way is not None and way.gateway}
        return None not in ways and hops == {ipaddress.ip_address(node.address)}

    async def paths(self, prefix: str) -> int:
        return len((await self.vtysh.prefix(4, prefix)).paths)

    async def stop(self) -> None:
        await self.routes.close()
        await self.stop_daemons()
        self._executor.shutdown()


def two_nodes(
    identifier: int | None,
    body: Callable[[Node, Node], Awaitable[None]],
    kind: type[Node] = Node,
) -> None:
    """`kind`: the near one's."""

    async def inside() -> None:
        with a_folder() as folder:
            near = kind(NEAR, folder / "near", identifier)
            far = Node(FAR, folder / "far", identifier)
            namespace = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
            try:
                await far.do(lambda: make_far_end(namespace))
                await near.do(make_near_end)
                await near.start(FAR)
                await body(near, far)
            finally:
                os.close(namespace)
                await near.stop()
                await far.stop()

    run_in_new_namespace(inside)


async def is_led(routes: FrrRoutes) -> bool:
    with contextlib.suppress(FabricError):
        await routes.lead_here(GUEST)
        return True
    return False


async def can_tell(routes: FrrRoutes) -> bool:
    return await routes.cut_off(GUEST[:1]) == ""


@pytest.mark.parametrize("identifier", [None, NETWORK], ids=["bgp", "evpn"])
def test_a_guest_moves_and_the_old_route_goes_when_the_new_one_is_seen(
    identifier: int | None,
) -> None:
    async def body(near: Node, far: Node) -> None:
        assert "no BGP neighbour is up" in await near.routes.cut_off(GUEST)
        await far.start(NEAR)
        for old, new in ((near, far), (far, near)):
            await old.routes.open()
            await eventually(partial(can_tell, old.routes))
            if identifier:
                for node in (old, new):
                    lines = [f"router bgp {SYSTEM}", "address-family l2vpn evpn"]
                    assert await node.routes.cut_off(GUEST[:1]) == ""
                    await node.vtysh.run(["configure terminal", *lines, "advertise ipv6 unicast"])
            await moves(old, new)

    two_nodes(identifier, body)


async def moves(old: Node, new: Node) -> None:
    await old.routes.prepare(GUEST)
    await old.open_port()
    await eventually(lambda: is_led(old.routes))
    await eventually(lambda: new.leads_to(old))
    await new.routes.open()
    await new.routes.prepare(GUEST)
    assert not await old.routes.leads_away(GUEST)
    assert await new.leads_to(old), "preparing moves nothing"
    await new.open_port()
    await eventually(lambda: old.routes.leads_away(GUEST))
    assert await old.leads_to(old), "it forwards on"
    assert await old.routes.hop_of(GUEST[0]) == new.address
    await eventually(lambda: is_led(new.routes))

    async def alone() -> bool:
        return await new.paths(f"{GUEST[0]}/32") == 1

    await eventually(alone)  # bgpd at the old node has heard that it is outweighed.
    await old.routes.withdraw(GUEST)
    await old.close_port()
    await eventually(lambda: old.leads_to(new))
    overlay = old.network.overlay
    if overlay is not None:
        hop = ipaddress.ip_address(new.address)
        assert await old.do(lambda: router_mac(overlay.bridge, hop)) is not None
    await new.routes.withdraw(GUEST)
    await new.close_port()


def test_a_bgpd_that_is_restarted_is_told_again() -> None:
    async def body(near: Node, far: Node) -> None:
        await far.start(NEAR)
        await near.routes.open()
        try:
            await near.routes.prepare(GUEST)
            await near.open_port()
            await eventually(lambda: far.leads_to(near))
            await near.stop_daemons()
            await near.start_daemons(FAR)
            await eventually(lambda: is_led(near.routes))
            await eventually(lambda: far.leads_to(near))
        finally:
            await near.close_port()

    two_nodes(None, body)


def test_what_evpn_lacks_is_named() -> None:
    async def body(near: Node, far: Node) -> None:
        await far.start(NEAR)
        await eventually(lambda: can_tell(near.routes))
        assert "`advertise ipv6 unicast`" in await near.routes.cut_off(GUEST)
        await near.vtysh.run(["configure terminal", f"no vni {NETWORK}"])
        assert f"`vni {NETWORK}`" in await near.routes.cut_off(GUEST)

    two_nodes(NETWORK, body)
