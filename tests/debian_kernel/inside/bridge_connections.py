"""Connections that stateful rules on bridges let pass go on where their guest goes.

The guest is a namespace whose one interface leads into the near node's bridge and then, when it
has moved, into the far one's; each bridge accepts only what its node knows of.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import os
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from pyroute2 import IPRoute

from migrator.model import DomainName
from netfabric import filters
from netfabric.connections import KernelConnections
from node_agent.doctor.findings import Level
from node_agent.doctor.links import check_connection_tracking
from tests.contract.fabric_worlds import eventually
from tests.contract.namespaces import unshare_network
from tests.debian_kernel.inside.vlan_nodes import (
    VlanNodes,
    attach,
    on_vlans,
    set_vlan,
    unset_vlan,
)

WEB = DomainName("web")
GUEST, CLIENT = "10.0.0.5", "10.0.0.9"
RULES = """
table FAMILY stateful {
  chain forward {
    type filter hook forward priority -200; policy accept;
    ct state established,related accept
    tcp flags & (syn | ack) == syn ct state new accept
    meta l4proto tcp counter drop
  }
}
"""
FAMILIES = ("bridge", "inet")
"""Whose rules: the bridge's own (nf_conntrack_bridge), or those for IP, which bridged packets pass
where br_netfilter is asked for that."""


class Guest:
    """Its end of the cable, and the client's, each in a thread of its namespace."""

    def __init__(self, nodes: VlanNodes, vlan_id: int) -> None:
        self.nodes = nodes
        self.vlan_id = vlan_id
        self._inside = concurrent.futures.ThreadPoolExecutor(1)
        self._client = concurrent.futures.ThreadPoolExecutor(1)
        self._opened: list[socket.socket] = []

    async def start(self) -> None:
        near = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        try:
            await self._do(self._inside, lambda: _make_end(near, "guest0", GUEST))
            await self._do(self._client, unshare_network)
            client = await self._do(self._client, _own_namespace)
            try:
                await asyncio.to_thread(_send_away, f"c{self.vlan_id}", client)
            finally:
                os.close(client)
            await self._do(self._client, lambda: _set_up(f"c{self.vlan_id}", CLIENT))
        finally:
            os.close(near)
        await asyncio.to_thread(_plug, self.vlan_id)

    async def connect(self) -> tuple[socket.socket, socket.socket]:
        """The client's end and the guest's of a new connection."""
        listener = await self._do(self._inside, lambda: socket.create_server((GUEST, 0)))
        target = listener.getsockname()
        near = await self._do(self._client, lambda: socket.create_connection(target, 20.0))
        far = await asyncio.to_thread(lambda: listener.accept()[0])
        far.settimeout(20.0)
        self._opened += [listener, near, far]
        return near, far

    async def move(self) -> None:
        """Pull the cable out of the near bridge, and put it into the far one."""
        far = await self.nodes.at_far(_own_namespace)
        try:
            await asyncio.to_thread(_send_away, "guest0", far)
        finally:
            os.close(far)
        await self.nodes.at_far(lambda: _plug(self.vlan_id))

    async def _do(self, where: concurrent.futures.Executor, work: Callable[[], Any]) -> Any:
        return await asyncio.wrap_future(where.submit(work))

    def close(self) -> None:
        for opened in self._opened:
            opened.close()
        self._inside.shutdown()
        self._client.shutdown()


def _own_namespace() -> int:
    return os.open("/proc/thread-self/ns/net", os.O_RDONLY)


def _make_end(near: int, peer: str, address: str) -> None:
    unshare_network()
    with IPRoute() as route:
        route.link("add", ifname="eth0", kind="veth", peer={"ifname": peer, "net_ns_fd": near})
    _set_up("eth0", address)


def _set_up(name: str, address: str) -> None:
    with IPRoute() as route:
        (index,) = route.link_lookup(ifname=name)
        route.addr("add", index=index, address=address, prefixlen=24)
        for each in (index, 1):
            route.link("set", index=each, state="up")


def _send_away(name: str, namespace: int) -> None:
    with IPRoute() as route:
        route.link("set", index=route.link_lookup(ifname=name)[0], net_ns_fd=namespace)


def _plug(vlan_id: int) -> None:
    attach("guest0", "br0")
    if vlan_id != 1:
        unset_vlan("guest0", 1)
        set_vlan("guest0", vlan_id, "pvid", "untagged")


def _keep_state(family: str) -> None:
    filters.run(RULES.replace("FAMILY", family), "test")
    wanted = "1" if family == "inet" else "0"
    for setting in ("call-iptables", "filter-vlan-tagged"):
        Path(f"/proc/sys/net/bridge/bridge-nf-{setting}").write_text(wanted)
    Path("/proc/sys/net/netfilter/nf_conntrack_tcp_loose").write_text("0")


def _dropped() -> int:
    (text,) = (
        filters.run(f"list chain {family} stateful forward", "test")
        for family in FAMILIES
        if f"table {family} stateful" in filters.run("list tables", "test")
    )
    return int(text.rpartition("packets ")[2].split()[0])


@contextlib.asynccontextmanager
async def a_guest(nodes: VlanNodes, vlan_id: int, family: str = "bridge") -> AsyncIterator[Guest]:
    await asyncio.to_thread(_keep_state, family)
    await nodes.at_far(lambda: _keep_state(family))
    with contextlib.closing(Guest(nodes, vlan_id)) as guest:
        await guest.start()
        yield guest


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("vlan_id", [1, 7])
def test_a_connection_goes_on_at_the_other_bridge_where_it_was_told_and_not_before(
    vlan_id: int, family: str
) -> None:
    async def body(nodes: VlanNodes) -> None:
        here, there = KernelConnections(), KernelConnections()
        async with a_guest(nodes, vlan_id, family) as guest:
            client, inside = await guest.connect()
            client.send(b"before")
            assert await asyncio.to_thread(inside.recv, 100) == b"before"
            taken = await here.take(WEB, [GUEST])
            assert (len(taken.connections), taken.translated) == (1, 0)
            await guest.move()
            client.send(b"to the guest")
            inside.send(b"to the client")

            async def cut() -> bool:
                return await nodes.at_far(_dropped) > 0

            await eventually(cut)
            for end in (client, inside):
                end.setblocking(False)
                with pytest.raises(BlockingIOError):
                    end.recv(100)
                end.settimeout(20.0)
            told = taken.connections
            assert await nodes.there(lambda: there.install(told, [GUEST])) == 1
            assert await asyncio.to_thread(inside.recv, 100) == b"to the guest"  # Sent again.
            assert await asyncio.to_thread(client.recv, 100) == b"to the client"
            assert await here.forget([GUEST], []) == 1
            assert await asyncio.to_thread(_dropped) == 0, "the near node never cut it"
        await here.close()
        await nodes.there(there.close)

    on_vlans(body)


def test_what_begins_while_the_guest_leaves_is_told_too() -> None:
    async def body(nodes: VlanNodes) -> None:
        here, there = KernelConnections(), KernelConnections()
        async with a_guest(nodes, 7) as guest:
            assert (await here.take(WEB, [GUEST])).connections == ()
            client, inside = await guest.connect()
            new = here.take_new(WEB).connections
            assert len(new) == 1
            assert await nodes.there(lambda: there.install(new, [GUEST])) == 1
            await guest.move()
            client.send(b"to the guest")
            assert await asyncio.to_thread(inside.recv, 100) == b"to the guest"
            assert await nodes.at_far(_dropped) == 0
        await here.close()
        await nodes.there(there.close)

    on_vlans(body)


def test_the_doctor_says_that_they_can_move() -> None:
    async def body(nodes: VlanNodes) -> None:
        await asyncio.to_thread(_keep_state, "bridge")
        finding = await asyncio.to_thread(check_connection_tracking)
        assert finding.level is Level.OK, finding

    on_vlans(body)
