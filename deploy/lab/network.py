"""The lab's bridges, cables and shaping, made with netlink (pyroute2).

Everything is level-triggered: `ensure_*` looks at what is there, makes what is missing and says
whether it made anything. Cables are made inside the switch's namespace with the far end placed
straight into its own, so the machine's own namespace never sees an interface of a lab.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from ipaddress import ip_address
from typing import Any, Final

from pyroute2 import IPRoute, NetlinkError

from deploy.lab.cables import GUEST_INTERFACE, SWITCH_GUEST_BRIDGE, SWITCH_MGMT_BRIDGE, Link, Subnet
from deploy.lab.namespaces import ensure_namespace, namespace_key, netlink_socket
from deploy.lab.plan import LabPlan
from migrator.errors import FabricError

PREFIX_BITS: Final = 24
PREFIX6_BITS: Final = 64
_ROOT_QDISC: Final = 0xFFFF_FFFF
"""TC_H_ROOT of linux/pkt_sched.h."""
_NO_DUPLICATE_DETECTION: Final = 0x02
_QUEUE_SECONDS: Final = 0.05
"""How long a packet may wait in a shaped link before it's dropped."""
_BURST_SECONDS: Final = 0.005
_BURST_BYTES_MIN: Final = 80 * 1024
"""One full GSO packet, which tbf would otherwise cut up."""


class _Namespace:
    """One namespace's netlink socket, with the few questions and orders that a lab needs.

    Its interfaces are looked at once, and again after what changed them here, or before one is
    deleted: of the lab's own ones nobody else makes any, and a look takes 5 ms of a core.
    """

    def __init__(self, name: str, route: Any) -> None:
        self.name = name
        self._route = route
        self._seen: dict[str, tuple[int, int | None]] | None = None

    def interfaces(self) -> dict[str, tuple[int, int | None]]:
        """Each interface's name: its index, and its bridge's index or None."""
        if self._seen is None:
            self._seen = {
                link.get_attr("IFLA_IFNAME"): (link["index"], link.get_attr("IFLA_MASTER"))
                for link in self._route.get_links()
            }
        return self._seen

    def look_again(self) -> None:
        """Something else than an order of ours may have changed the interfaces."""
        self._seen = None

    def _change(self, command: str, **what: Any) -> None:
        """An order to the kernel by which interfaces, or their bridges, become others."""
        self.look_again()
        self._route.link(command, **what)

    def raise_up(self, interface: str, *, bridge: str | None = None) -> None:
        interfaces = self.interfaces()
        index, master = interfaces[interface]
        if bridge is not None and master != interfaces[bridge][0]:
            self._change("set", index=index, master=interfaces[bridge][0])
        self._route.link("set", index=index, state="up")

    def widen(self, interface: str, mtu_bytes: int) -> None:
        self._route.link("set", index=self.interfaces()[interface][0], mtu=mtu_bytes)

    def ensure_bridge(self, name: str) -> None:
        if name not in self.interfaces():
            # No spanning tree and no forward delay: a port forwards as soon as it's plugged in.
            # No snooping: without a querier it would drop mDNS and neighbour discovery.
            self._change(
                "add",
                ifname=name,
                kind="bridge",
                br_stp_state=0,
                br_forward_delay=0,
                br_mcast_snooping=0,
            )
        self.raise_up(name)

    def ensure_address(self, interface: str, address: str) -> None:
        index = self.interfaces()[interface][0]
        held = {item.get_attr("IFA_ADDRESS") for item in self._route.get_addr(index=index)}
        if address not in held:
            self._route.addr("add", index=index, address=address, prefixlen=PREFIX_BITS)

    def ensure_subnet(
        self, interface: str, address: str, bits: int, *more: tuple[str, int]
    ) -> None:
        """The addresses on an interface that is up."""
        index = self.interfaces()[interface][0]
        told = (item.get_attr("IFA_ADDRESS") for item in self._route.get_addr(index=index))
        held = {ip_address(text) for text in told}  # "fd78:0::1" is told as "fd78::1".
        for text, prefix_bits in ((address, bits), *more):
            if ip_address(text) not in held:
                flags = {"flags": _NO_DUPLICATE_DETECTION} if ":" in text else {}
                self._route.addr("add", index=index, address=text, prefixlen=prefix_bits, **flags)

    def ensure_default_route(self, gateway: str) -> None:
        family = socket.AF_INET6 if ":" in gateway else socket.AF_INET
        default = "::/0" if ":" in gateway else "0.0.0.0/0"
        self._route.route("replace", dst=default, gateway=gateway, family=family)

    def add_veth(self, name: str, end: _Namespace, peer: str) -> None:
        end.look_again()
        self._change("add", ifname=name, kind="veth", peer={"ifname": peer, "net_ns_fd": end.name})

    def delete(self, interface: str) -> None:
        """It may be going by itself: with its cable's other end, or with that one's namespace,
        which the kernel clears away some time after its removal."""
        self.look_again()
        found = self.interfaces().get(interface)
        if found is None:
            return
        try:
            self._change("del", index=found[0])
        except NetlinkError as error:
            if error.code != errno.ENODEV:
                raise

    def shape(self, interface: str, link_mbit: int | None) -> None:
        """Set the rate at which `interface` sends, or lift it."""
        index = self.interfaces()[interface][0]
        if link_mbit is None:
            try:
                self._route.tc("del", index=index, parent=_ROOT_QDISC)
            except NetlinkError as error:
                if error.code not in (errno.ENOENT, errno.EINVAL):
                    raise
            return
        burst_bytes, limit_bytes = shaping_bytes(link_mbit)
        self._route.tc(
            "replace",
            "tbf",
            index=index,
            rate=link_mbit * 1_000_000 // 8,
            burst=burst_bytes,
            limit=limit_bytes,
        )


def shaping_bytes(link_mbit: int) -> tuple[int, int]:
    """(burst, queue) in bytes of a link of `link_mbit` Mbit/s."""
    bytes_per_s = link_mbit * 1_000_000 // 8
    burst = max(_BURST_BYTES_MIN, int(bytes_per_s * _BURST_SECONDS))
    return burst, burst + max(_BURST_BYTES_MIN, int(bytes_per_s * _QUEUE_SECONDS))


@contextmanager
def _opened(name: str) -> Iterator[_Namespace]:
    try:
        route = IPRoute(fileno=netlink_socket(name))
    except (OSError, NetlinkError) as error:
        raise FabricError(f"the namespace {name} can't be entered: {error}") from error
    try:
        yield _Namespace(name, route)
    except (OSError, NetlinkError) as error:
        raise FabricError(f"the network in namespace {name} can't be set up: {error}") from error
    finally:
        route.close()


def ensure_network(plan: LabPlan, made: Callable[[str], None]) -> None:
    """Make or repair the lab's namespaces, bridges, cables, addresses and shaping.

    Calls `made` with each new namespace's name at once, so that an interrupted caller can remove
    it. Raises FabricError; what was made stays, for the caller to remove or for the next repair.
    """
    for name in plan.namespaces:
        if ensure_namespace(name):
            made(name)
    with _opened(plan.switch) as switch, _opened(_hub(plan)) as router:
        switch.raise_up("lo")
        switch.ensure_bridge(SWITCH_GUEST_BRIDGE)
        switch.ensure_bridge(SWITCH_MGMT_BRIDGE)
        router.raise_up("lo")
        for namespace in plan.namespaces[1:]:
            links = [link for link in plan.links if link.namespace == namespace]
            with _opened(namespace) as end:
                _ensure_links(switch, router, end, links, plan.link_mbit)


def _hub(plan: LabPlan) -> str:
    """Where cables without a bridge end: the router; there are none where there is none."""
    return plan.router if plan.has_router else plan.switch


def _ensure_links(
    switch: _Namespace,
    router: _Namespace,
    end: _Namespace,
    links: Iterable[Link],
    link_mbit: int | None,
) -> None:
    end.raise_up("lo")
    for link in links:
        hub = router if link.bridge is None else switch
        if link.node_bridge is not None:
            end.ensure_bridge(link.node_bridge)
        if link.port not in hub.interfaces() or link.interface not in end.interfaces():
            hub.delete(link.port)
            end.delete(link.interface)
            hub.add_veth(link.port, end, link.interface)
        hub.raise_up(link.port, bridge=link.bridge)
        if link.address is not None and link.subnet is None:
            end.ensure_address(link.interface, link.address)
        end.raise_up(link.interface, bridge=link.node_bridge)
        if link.address6 is not None:
            end.ensure_subnet(link.interface, link.address6, PREFIX6_BITS)
        if link.subnet is not None:
            _ensure_subnet(hub, end, link, link.subnet)
        if link.mtu_bytes is not None:
            hub.widen(link.port, link.mtu_bytes)
            end.widen(link.interface, link.mtu_bytes)
        if link.shaped:
            hub.shape(link.port, link_mbit)
            end.shape(link.interface, link_mbit)


def _ensure_subnet(router: _Namespace, end: _Namespace, link: Link, subnet: Subnet) -> None:
    bits, bits6 = subnet.prefix_bits, subnet.prefix6_bits
    router.ensure_subnet(link.port, subnet.router, bits, (subnet.router6, bits6))
    end.ensure_subnet(link.interface, subnet.address, bits, (subnet.address6, bits6))
    end.ensure_default_route(subnet.router)
    end.ensure_default_route(subnet.router6)


def missing_interfaces(plan: LabPlan) -> list[str]:
    """What of the lab's network isn't there, as `namespace` or `namespace/interface`."""
    absent = [name for name in plan.namespaces if namespace_key(name) is None]
    wanted: dict[str, set[str]] = {
        plan.switch: {SWITCH_GUEST_BRIDGE, SWITCH_MGMT_BRIDGE},
        **{node.namespace: set[str]() for node in plan.nodes},
        plan.namespace("client"): {GUEST_INTERFACE},
    }
    for link in plan.links:
        wanted.setdefault(_hub(plan) if link.bridge is None else plan.switch, set()).add(link.port)
        if link.node_bridge is not None:
            wanted[link.namespace].add(link.node_bridge)
        wanted.setdefault(link.namespace, set()).add(link.interface)
    for name, interfaces in wanted.items():
        if name not in absent:
            with _opened(name) as namespace:
                absent += sorted(
                    f"{name}/{interface}" for interface in interfaces - set(namespace.interfaces())
                )
    return absent
