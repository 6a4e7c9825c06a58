"""The configuration's `[fabric]` table: the guests' network, and who is told where guests are."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator
from typing import Annotated, Literal

import msgspec

from node_agent.config_table import Table

_Port = Annotated[int, msgspec.Meta(ge=1, le=65535)]


class FabricTable(Table, frozen=True, kw_only=True):
    driver: Annotated[
        Literal["bridge", "vxlan", "routed", "macvtap", "simulated"],
        msgspec.Meta(description='"bridge", "vxlan", "routed", "macvtap" or "simulated"'),
    ] = "bridge"
    bridge: Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9._-]{0,15}$")] = ""
    """vxlan: the bridge that the agent makes, which NICs name. routed, macvtap: the name that
    NICs give."""
    uplink: Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9._-]{0,15}$")] = ""
    """macvtap: the interface into the guests' network, which is no bridge's port."""
    identifier: Annotated[int, msgspec.Meta(ge=0, lt=1 << 24)] = 0
    """vxlan, and routed with evpn: the network identifier, the same on every node."""
    local: str = ""
    """vxlan: this node's end. routed: its address in the network. Default: `migration.address`."""
    local6: str = ""
    """routed: its IPv6 address in the network, where guests have such."""
    remotes: tuple[str, ...] = ()
    """vxlan: the other nodes' ends."""
    evpn: bool = False
    """This node's FRR tells and hears where guests are. vxlan: by MAC (type 2), instead of
    `remotes`. routed, with routes "frr": by address (type 5), and packets take a VXLAN."""
    port: _Port = 4789
    mtu_bytes: Annotated[int, msgspec.Meta(ge=576, le=65521)] = 1450
    """vxlan, evpn: of the guests' network; 50 bytes less than the nodes' own (70 over IPv6)."""
    gateways: tuple[str, ...] = ()
    """routed: addresses that guests have as their router, which is this node wherever they are."""
    routes: Annotated[
        Literal["none", "netlink", "webhook", "frr"],
        msgspec.Meta(description='"none", "netlink", "webhook" or "frr"'),
    ] = "none"
    """routed: how the routers follow a guest."""
    route_peers: tuple[str, ...] = ()
    """netlink: addresses of the other nodes and of the routers in the network."""
    route_key_file: Annotated[
        str, msgspec.Meta(description="an absolute path", pattern=r"^(/|$)", max_length=4096)
    ] = ""
    """netlink, webhook: the file with the shared key, at least 16 bytes."""
    route_port: _Port = 7783
    """netlink: UDP."""
    route_url: Annotated[
        str, msgspec.Meta(description='"http://..." or "https://..."', pattern=r"^(https?://.+)?$")
    ] = ""
    """webhook: who is told."""
    frr_vty_directory: Annotated[
        str, msgspec.Meta(description="an absolute path", pattern=r"^/", max_length=4096)
    ] = "/var/run/frr"
    """frr: where its daemons' sockets are."""
    grace_s: Annotated[float, msgspec.Meta(ge=0, le=600)] = 5.0
    """For so long the old node of a migrated guest forwards what still arrives there."""
    verify_limit_s: Annotated[float, msgspec.Meta(gt=0, le=600)] = 5.0
    tunnel_port: _Port = 7782


def fabric_contradictions(fabric: FabricTable) -> Iterator[str]:
    """What is wrong between its keys."""
    if fabric.driver == "vxlan":
        if not fabric.bridge:
            yield "fabric.bridge: missing; must name the bridge to make, which NICs name"
        if not fabric.identifier:
            yield "fabric.identifier: missing; must be 1 to 16777215, the same on every node"
        if fabric.evpn and fabric.remotes:
            yield "fabric.remotes: with evpn, FRR knows the other nodes; leave them out"
    elif fabric.evpn and fabric.driver != "routed":
        yield f'fabric.evpn: only drivers "vxlan" and "routed" have EVPN, not "{fabric.driver}"'
    if fabric.driver == "macvtap":
        if not fabric.bridge:
            yield "fabric.bridge: missing; must be the network's name, which NICs give"
        if not fabric.uplink:
            yield "fabric.uplink: missing; must name the interface into the guests' network"
    if fabric.driver == "routed":
        if not fabric.bridge:
            yield "fabric.bridge: missing; must be the network's name, which NICs give"
        yield from _address_problems(fabric)
        yield from _route_problems(fabric)
        if fabric.evpn:
            yield from _evpn_problems(fabric)
    elif fabric.routes != "none":
        yield f'fabric.routes: only driver "routed" has routes, not "{fabric.driver}"'


def _address_problems(fabric: FabricTable) -> Iterator[str]:
    for key, texts in (
        ("local", [fabric.local] if fabric.local else []),
        ("local6", [fabric.local6] if fabric.local6 else []),
        ("gateways", fabric.gateways),
        ("route_peers", fabric.route_peers),
    ):
        for text in texts:
            try:
                version = ipaddress.ip_address(text).version
            except ValueError:
                yield f'fabric.{key}: "{text}" is not an IPv4 or IPv6 address'
                continue
            if key == "local6" and version != 6:
                yield f'fabric.local6: "{text}" is not an IPv6 address'


def _evpn_problems(fabric: FabricTable) -> Iterator[str]:
    if fabric.routes != "frr":
        yield f'fabric.evpn: FRR says them, so fabric.routes must be "frr", not "{fabric.routes}"'
    if not fabric.identifier:
        yield "fabric.identifier: missing; must be 1 to 16777215, the same on every node"
    if ":" in fabric.local:
        yield "fabric.local: FRR's VXLANs end at IPv4 addresses; must be one"


def _route_problems(fabric: FabricTable) -> Iterator[str]:
    if fabric.routes in ("netlink", "webhook") and not fabric.route_key_file:
        yield "fabric.route_key_file: missing; must be an absolute path of the shared key"
    if fabric.routes == "netlink" and not fabric.route_peers:
        yield "fabric.route_peers: missing; must list the other nodes and the routers"
    if fabric.routes == "webhook" and not fabric.route_url:
        yield 'fabric.route_url: missing; must be "http://..." or "https://..."'
