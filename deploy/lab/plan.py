"""The plan of a lab: every name, address and path, worked out before anything is made. Pure.

A lab is a cluster on one machine. Each node is a network namespace; two networks meet in a
namespace of their own, the switch, so that guest and migration traffic can be told apart:

    fy-LAB-n1                        fy-LAB-switch                       fy-LAB-client
    ┌──────────────────────────┐     ┌───────────────────────────┐       ┌─────────────┐
    │ guests ─ br0 ─── uplink0 ┼─────┼ g-n1 ─┐                   │       │             │
    │ agent ────────── mgmt0   ┼──┐  │       ├ guests ── g-client ┼───────┼ guest0      │
    └──────────────────────────┘  │  │ g-n2 ─┘  (bridge)         │       │             │
    fy-LAB-n2                     │  │                           │       │             │
    ┌──────────────────────────┐  └──┼ m-n1 ─┐                   │       │             │
    │ guests ─ br0 ─── uplink0 ┼─g-n2│       ├ mgmt ──── m-client ┼───────┼ mgmt0       │
    │ agent ────────── mgmt0   ┼─────┼ m-n2 ─┘  (bridge)         │       └─────────────┘
    └──────────────────────────┘     │          └──── m-storage ─┼─ mgmt0 of fy-LAB-storage
                                     └───────────────────────────┘

Rules:
- Nothing of a lab is ever visible in the machine's own network namespace.
- 10.77.L.0/24 carries management, migrations and storage; 10.78.L.0/24 belongs to the guests, as
  does fd78:L::/64.
  L is the lab's index on this machine, so that labs side by side never share an address.
- `link_mbit` shapes both ends of both of a node's links.
- With `fabric` routed, bgp or evpn there is no guests' network to share: each node, and the client,
  has a cable to fy-LAB-router and a subnet of its own (`deploy.lab.routed`). With evpn the nodes
  and the router share 10.76.L.0/24 instead, at the switch; what guests say isn't seen there.
- With vxlan or evpn-l2 the cables are the same, and the nodes and the client are ends of an overlay
  (`deploy.lab.overlay`): the guests' network is one layer 2 again.
- With `fabric` macvtap there is no br0: guests are above uplink0.
- With `store` etcd, its three members have hosts of their own: fy-LAB-etcd1 to 3, beside storage.
- A namespace's name always ends in its role, so a name belongs to exactly one lab.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

import msgspec

from deploy.lab.cables import (
    GUEST_INTERFACE,
    NODE_UPLINK,
    SWITCH_GUEST_BRIDGE,
    Link,
    Subnet,
    evpn_link,
    mgmt_link,
    routed_link,
)
from deploy.lab.kinds import OVERLAY_FABRICS, ROUTED_FABRICS, FabricKind, StoreKind
from migrator.errors import InvalidRequest, NotFoundError

NODES_MAX: Final = 200
"""The host part of an address is the node's number; 201 and up belong to the lab's services."""
ROUTED_NODES_MAX: Final = 120
"""Of 10.76.L.0/24 each node has a /31."""
INDEX_MAX: Final = 255
LINK_MBIT_MAX: Final = 30_000
"""A tbf qdisc's classic rate field is 32 bits of bytes per second (34 Gbit/s)."""
MEMORY_BYTES_DEFAULT: Final = 4 * 1024**3
"""What each node of a lab offers to domains."""
SOCKET_PATH_BYTES_MAX: Final = 107
"""sockaddr_un.sun_path, less the terminating zero."""
_DEEPEST_SOCKET: Final = 48
"""Bytes to spare below a node's state folder for its drivers' sockets."""

ETCD_MEMBERS: Final = 3
ETCD_CLIENT_PORT: Final = 2379
ETCD_PEER_PORT: Final = 2380

GUEST_BRIDGE: Final = "br0"
"""The bridge in each node that a domain's `NicSpec.bridge` names."""

_LAB_NAME: Final = re.compile(r"[a-z0-9]([a-z0-9-]{0,18}[a-z0-9])?")
_NAMESPACE: Final = re.compile(
    r"fy-(?P<lab>[a-z0-9]([a-z0-9-]{0,18}[a-z0-9])?)-(?P<role>n[0-9]+|switch|router|client|storage|etcd[1-3])"
)


class NodePlan(msgspec.Struct, frozen=True, kw_only=True):
    """One node's names, addresses and paths."""

    name: str
    namespace: str
    mgmt_address: str
    folder: Path
    """Everything the node keeps: configuration, log, state folder, API socket."""

    @property
    def config_path(self) -> Path:
        return self.folder / "config.toml"

    @property
    def log_path(self) -> Path:
        return self.folder / "agent.log"

    @property
    def state_path(self) -> Path:
        return self.folder / "state"

    @property
    def api_socket(self) -> Path:
        return self.folder / "api.sock"


class EtcdMemberPlan(msgspec.Struct, frozen=True, kw_only=True):
    """One member of the lab's etcd: its host, and where it keeps things."""

    name: str
    namespace: str
    address: str
    folder: Path

    @property
    def log_path(self) -> Path:
        return self.folder / "etcd.log"


class LabPlan(msgspec.Struct, frozen=True, kw_only=True):
    """A whole lab. Two plans with the same fields are the same lab. Make it with `make_plan`."""

    name: str
    index: int
    """L of the addresses; 0 to 255."""
    node_count: int
    folder: Path
    link_mbit: int | None = None
    """Rate of each node's links in Mbit/s; None: not shaped."""
    node_memory_bytes: int = MEMORY_BYTES_DEFAULT
    store: StoreKind = StoreKind.SQLITE
    """Where the cluster's state is."""
    storage: tuple[str, ...] = ()
    """Its storage servers beside the folder of volumes: `deploy.lab.storage` knows them."""
    fabric: FabricKind = FabricKind.BRIDGE
    tls: bool = False
    """Whether its agents were joined by `ferry cluster init`, `token` and `join`; else plain."""

    def namespace(self, role: str) -> str:
        return namespace_name(self.name, role)

    @property
    def switch(self) -> str:
        return self.namespace("switch")

    @property
    def router(self) -> str:
        """The router's namespace, where the lab has one."""
        return self.namespace("router")

    @property
    def is_routed(self) -> bool:
        """Whether each guest's address is a host route."""
        return self.fabric in ROUTED_FABRICS

    @property
    def is_overlay(self) -> bool:
        return self.fabric in OVERLAY_FABRICS

    @property
    def has_router(self) -> bool:
        """Whether the nodes share no layer 2 but management's."""
        return self.is_routed or self.is_overlay

    def subnet(self, number: int) -> Subnet:
        """A node's, by its number, where there is a router. By EVPN type 5 the nodes share one."""
        if self.fabric is FabricKind.EVPN:
            return Subnet(
                address=f"10.76.{self.index}.{number}",
                router=f"10.76.{self.index}.254",
                prefix_bits=24,
                address6=f"fd76:{self.index:x}::{number:x}",
                router6=f"fd76:{self.index:x}::fe",
            )
        return Subnet(
            address=f"10.76.{self.index}.{2 * number}",
            router=f"10.76.{self.index}.{2 * number + 1}",
            prefix_bits=31,
            address6=f"fd76:{self.index:x}:{number:x}::2",
            router6=f"fd76:{self.index:x}:{number:x}::1",
        )

    @property
    def client_subnet(self) -> Subnet:
        return Subnet(
            address=f"10.75.{self.index}.250",
            router=f"10.75.{self.index}.254",
            prefix_bits=24,
            address6=f"fd75:{self.index:x}::250",
            router6=f"fd75:{self.index:x}::254",
        )

    @property
    def guest_gateway(self) -> str | None:
        """What guests have as their router: whichever node they are on. None: they need none."""
        return f"10.78.{self.index}.254" if self.is_routed else None

    @property
    def guest_network6(self) -> str:
        return f"fd78:{self.index:x}::/64"

    def guest_address6(self, number: int) -> str:
        """The IPv6 address beside `guest_address(number)`."""
        self.guest_address(number)
        return f"fd78:{self.index:x}::{number}"

    @property
    def route_key_path(self) -> Path:
        """The key that the nodes and the router share."""
        return self.folder / "routes.key"

    @property
    def namespaces(self) -> tuple[str, ...]:
        """Every namespace of the lab, the switch first."""
        router = (self.router,) if self.has_router else ()
        return (
            self.switch,
            *router,
            self.namespace("client"),
            self.namespace("storage"),
            *(member.namespace for member in self.etcd_members),
            *(node.namespace for node in self.nodes),
        )

    @property
    def nodes(self) -> tuple[NodePlan, ...]:
        return tuple(
            NodePlan(
                name=f"n{number}",
                namespace=self.namespace(f"n{number}"),
                mgmt_address=f"10.77.{self.index}.{number}",
                folder=self.folder / f"n{number}",
            )
            for number in range(1, self.node_count + 1)
        )

    @property
    def etcd_members(self) -> tuple[EtcdMemberPlan, ...]:
        """None where the cluster's state is an SQLite file."""
        if self.store is not StoreKind.ETCD:
            return ()
        return tuple(
            EtcdMemberPlan(
                name=f"etcd{number}",
                namespace=self.namespace(f"etcd{number}"),
                address=f"10.77.{self.index}.{251 + number}",
                folder=self.folder / f"etcd{number}",
            )
            for number in range(1, ETCD_MEMBERS + 1)
        )

    def node(self, name: str) -> NodePlan:
        """The node called `name`. Raises NotFoundError naming the ones there are."""
        for node in self.nodes:
            if node.name == name:
                return node
        names = ", ".join(node.name for node in self.nodes)
        raise NotFoundError(f"lab {self.name} has no node {name!r}; its nodes are {names}")

    def namespace_of(self, where: str) -> str:
        """Of a node, or of another host of the lab. NotFoundError naming all that there are."""
        router = ("router",) if self.has_router else ()
        nodes = (node.name for node in self.nodes)
        members = (member.name for member in self.etcd_members)
        known = (*nodes, "client", "storage", "switch", *router, *members)
        if where not in known:
            names = ", ".join(known)
            raise NotFoundError(f"lab {self.name} has no {where!r}; it has {names}")
        return self.namespace(where)

    @property
    def guest_network(self) -> str:
        return f"10.78.{self.index}.0/24"

    @property
    def mgmt_network(self) -> str:
        return f"10.77.{self.index}.0/24"

    @property
    def client_mgmt_address(self) -> str:
        return f"10.77.{self.index}.250"

    @property
    def client_guest_address(self) -> str:
        return self.client_subnet.address if self.is_routed else f"10.78.{self.index}.250"

    @property
    def client_guest_address6(self) -> str:
        return self.client_subnet.address6 if self.is_routed else f"fd78:{self.index:x}::250"

    @property
    def storage_address(self) -> str:
        return f"10.77.{self.index}.251"

    def guest_address(self, number: int) -> str:
        """The guest network's address `number`, 1 to 249. Raises InvalidRequest beyond."""
        if not 1 <= number < 250:
            raise InvalidRequest(f"guest addresses of a lab are numbered 1 to 249, not {number}")
        return f"10.78.{self.index}.{number}"

    @property
    def volumes_path(self) -> Path:
        """The folder of the pool `default`, the same for every node."""
        return self.folder / "volumes"

    @property
    def store_path(self) -> Path:
        """The cluster state's SQLite file, the same for every node."""
        return self.folder / "cluster.sqlite"

    @property
    def record_path(self) -> Path:
        return self.folder / "lab.json"

    @property
    def links(self) -> tuple[Link, ...]:
        """Every cable of the lab."""
        links: list[Link] = []
        for number, node in enumerate(self.nodes, 1):
            links.append(self._guest_link(node, number))
            links.append(mgmt_link(node.name, node.namespace, node.mgmt_address, shaped=True))
        links.append(self._client_link())
        if self.fabric is FabricKind.EVPN:
            own = self.subnet(1)
            links.append(evpn_link("router", self.router, own.router, own.router6))
        client, storage = self.namespace("client"), self.namespace("storage")
        links.append(mgmt_link("client", client, self.client_mgmt_address))
        links.append(mgmt_link("storage", storage, self.storage_address))
        links += (
            mgmt_link(member.name, member.namespace, member.address) for member in self.etcd_members
        )
        return tuple(links)

    def _client_link(self) -> Link:
        namespace = self.namespace("client")
        if self.has_router:
            interface = NODE_UPLINK if self.is_overlay else GUEST_INTERFACE
            subnet, overlay = self.client_subnet, self.is_overlay
            return routed_link("client", namespace, subnet, interface=interface, overlay=overlay)
        return Link(
            port="g-client",
            bridge=SWITCH_GUEST_BRIDGE,
            namespace=namespace,
            interface=GUEST_INTERFACE,
            address=self.client_guest_address,
            address6=self.client_guest_address6,
        )

    def _guest_link(self, node: NodePlan, number: int) -> Link:
        if self.fabric is FabricKind.EVPN:
            own = self.subnet(number)
            return evpn_link(node.name, node.namespace, own.address, own.address6)
        if self.has_router:
            overlay = self.is_overlay
            return routed_link(node.name, node.namespace, self.subnet(number), overlay=overlay)
        return Link(
            port=f"g-{node.name}",
            bridge=SWITCH_GUEST_BRIDGE,
            namespace=node.namespace,
            interface=NODE_UPLINK,
            node_bridge=GUEST_BRIDGE if self.fabric is FabricKind.BRIDGE else None,
            shaped=True,
        )


def namespace_name(lab: str, role: str) -> str:
    """`role`: a node's or an etcd member's name, `switch`, `router`, `client` or `storage`."""
    return f"fy-{lab}-{role}"


def lab_of_namespace(namespace: str) -> str | None:
    """The lab that a namespace belongs to by its name; None: to no lab."""
    found = _NAMESPACE.fullmatch(namespace)
    return found["lab"] if found else None


def check_lab_name(name: str) -> None:
    """Raises InvalidRequest unless `name` can be a lab's."""
    if not _LAB_NAME.fullmatch(name):
        raise InvalidRequest(
            f"{name!r} can't be a lab's name: use 1 to 20 lower-case letters, digits and hyphens, "
            "no hyphen at either end"
        )


def check_fabric(node_count: int, fabric: FabricKind) -> None:
    """Raises InvalidRequest unless so many nodes have room in it."""
    if fabric in (*ROUTED_FABRICS, *OVERLAY_FABRICS) and node_count > ROUTED_NODES_MAX:
        text = f"a lab with a router has 1 to {ROUTED_NODES_MAX} nodes, not {node_count}"
        raise InvalidRequest(text, {"nodes": text})


def make_plan(
    name: str,
    *,
    index: int,
    node_count: int,
    labs_root: Path,
    link_mbit: int | None = None,
    node_memory_bytes: int = MEMORY_BYTES_DEFAULT,
    store: StoreKind = StoreKind.SQLITE,
    storage: tuple[str, ...] = (),
    tls: bool = False,
) -> LabPlan:
    """Work out a lab; its folder is `labs_root`/`name`. Raises InvalidRequest, all faults at once.

    `link_mbit`: Mbit/s of each node's links, 1 to 30000, or None. `index`: 0 to 255.
    """
    check_lab_name(name)
    faults: dict[str, str] = {}
    if not 1 <= node_count <= NODES_MAX:
        faults["nodes"] = f"a lab has 1 to {NODES_MAX} nodes, not {node_count}"
    if not 0 <= index <= INDEX_MAX:
        faults["index"] = f"a lab's index is 0 to {INDEX_MAX}, not {index}"
    if link_mbit is not None and not 1 <= link_mbit <= LINK_MBIT_MAX:
        faults["link_mbit"] = f"a link has 1 to {LINK_MBIT_MAX} Mbit/s, not {link_mbit}"
    if not labs_root.is_absolute():
        faults["labs_root"] = f"the labs' folder must be an absolute path, not {labs_root}"
    folder = labs_root / name
    deepest = len(str(folder / f"n{node_count}" / "state")) + _DEEPEST_SOCKET
    if deepest > SOCKET_PATH_BYTES_MAX:
        faults["labs_root"] = (
            f"{folder} is {deepest - SOCKET_PATH_BYTES_MAX} bytes too long for the sockets below "
            "it; choose a shorter folder with FERRY_LAB_ROOT or a shorter name"
        )
    if faults:
        raise InvalidRequest("; ".join(faults.values()), faults)
    return LabPlan(
        name=name,
        index=index,
        node_count=node_count,
        folder=folder,
        link_mbit=link_mbit,
        node_memory_bytes=node_memory_bytes,
        store=store,
        storage=storage,
        tls=tls,
    )
