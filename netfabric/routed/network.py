"""The routed network as one node sees it, and what a node must be told to carry it.

    guest ── tap (169.254.1.1, fe80::1; answers ARP for everybody) ── node ── uplink ── routers

By EVPN the way out is an overlay: a VXLAN to every node and router that takes part, on a bridge
with only that one port, into which FRR routes (a "symmetric" one, RFC 9136, section 4.4.1).

Synchronous; belongs into a thread.
"""

from __future__ import annotations

import contextlib
import ipaddress
import logging
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from migrator.errors import FabricError
from migrator.model import NicSpec
from netfabric import filters
from netfabric.bridge.links import netlink
from netfabric.checks import nic_reasons
from netfabric.host_routes import Address, interface_of
from netfabric.uplinks import uplink_reason
from netfabric.vxlan.overlay import Overlay, ensure

GATEWAY4: Final = "169.254.1.1"
GATEWAY6: Final = "fe80::1"
"""Every guest's router, on every node: its tap has these addresses."""
SETTINGS: Final = Path("/proc/sys/net")
"""Of the calling thread's network namespace, other than /sys."""
_LOOSE: Final = "2"
_SCOPE_LINK: Final = 253

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RoutedNetwork:
    """`name`: what NICs give as their `bridge`. `local`: this node's addresses in the routed
    network, one of each IP version at most: its guests are by them. `gateways`: more addresses
    that guests are answered for as their router.
    """

    name: str
    local: tuple[str, ...]
    gateways: tuple[str, ...] = ()
    overlay: Overlay | None = None
    """What FRR routes into, by EVPN; None: packets leave by the uplink as they are."""

    @property
    def hops(self) -> tuple[Address, ...]:
        return tuple(ipaddress.ip_address(text) for text in self.local)

    def hop_for(self, address: Address) -> Address | None:
        """This node's address of the same IP version."""
        return next((hop for hop in self.hops if hop.version == address.version), None)


def addresses_of(nic: NicSpec) -> tuple[Address, ...]:
    """What is routed to the NIC."""
    return tuple(ipaddress.ip_address(text) for text in nic.addresses)


def uplink_of(network: RoutedNetwork, version: int) -> str | None:
    """The interface with this node's own address of that IP version."""
    for hop in network.hops:
        if hop.version == version:
            return interface_of(hop)
    return None


def needed_bytes(network: RoutedNetwork, nic: NicSpec) -> int:
    """The MTU that the uplink must have for the NIC's packets."""
    if network.overlay is None:
        return nic.mtu_bytes
    return nic.mtu_bytes + network.overlay.overhead_bytes


def reasons(network: RoutedNetwork, nic: NicSpec) -> list[str]:
    """Why the NIC can't be plugged here; empty if it can. Changes nothing. FabricError."""
    found = nic_reasons(nic) + filters.filter_reasons(nic)
    if nic.bridge != network.name:
        found.append(
            f"there is no bridge {nic.bridge} here: this node routes, and its network is called"
            f" {network.name}"
        )
        return found
    if nic.vlan is not None:
        found.append(f"NIC {nic.mac} is to be in VLAN {nic.vlan}, but a routed network has none")
    if not nic.addresses:
        found.append(f"NIC {nic.mac} has no addresses; a routed NIC needs them in its definition")
    with contextlib.suppress(ValueError):  # told above
        for address in addresses_of(nic):
            if network.hop_for(address) is None:
                found.append(
                    f"{address} can't be routed here: this node has no IPv{address.version} address"
                    f" in network {network.name}"
                )
    return found + _width_reasons(network, nic)


def _width_reasons(network: RoutedNetwork, nic: NicSpec) -> list[str]:
    found: list[str] = []
    overhead = network.overlay.overhead_bytes if network.overlay else 0
    if network.overlay is not None and network.overlay.mtu_bytes < nic.mtu_bytes:
        found.append(
            f"{network.overlay.bridge} has an MTU of {network.overlay.mtu_bytes} bytes"
            f" (fabric.mtu_bytes), NIC {nic.mac} needs {nic.mtu_bytes}"
        )
    for hop in network.hops:
        reason = uplink_reason(hop, nic, overhead)
        if reason is not None:
            found.append(reason)
    return list(dict.fromkeys(found))


def prepare_node(network: RoutedNetwork) -> None:
    """Let this node forward, and take answers that come another way than they would go.

    FabricError: the settings can't be changed.
    """
    versions = {hop.version for hop in network.hops}
    if 4 in versions:
        _ensure("ipv4/ip_forward", "1")
    if 6 in versions:
        _ensure("ipv6/conf/all/forwarding", "1")
    for version in versions:
        uplink = uplink_of(network, version)
        if uplink is None:
            log.warning("no interface has this node's address in network %s", network.name)
        elif version == 4:
            _ensure(f"ipv4/conf/{uplink}/rp_filter", _LOOSE)
    if network.overlay is not None:
        _prepare_overlay(network.overlay, versions)


def _prepare_overlay(overlay: Overlay, versions: Collection[int]) -> None:
    ensure(overlay)
    with netlink(f"can't look at {overlay.bridge}") as kernel:
        bridge = kernel.find(overlay.bridge)
    if bridge is None:
        raise FabricError(f"{overlay.bridge} was removed by somebody else")
    be_router4(overlay.bridge, bridge.index)
    if 6 in versions:
        set_value(f"ipv6/conf/{overlay.bridge}/disable_ipv6", "0")
        set_value(f"ipv6/conf/{overlay.bridge}/forwarding", "1")


def be_router4(interface: str, index: int) -> None:
    """Take IPv4 packets from everybody on it: rp_filter is loose, and it has an address.

    A guest that leaves is routed into a tunnel while its own packets still come by its tap. The
    kernel's loose filter lets such pass only where the interface has any IPv4 address at all.
    """
    set_value(f"ipv4/conf/{interface}/rp_filter", _LOOSE)
    set_value(f"ipv4/conf/{interface}/forwarding", "1")
    give_address4(index, GATEWAY4)


def give_address4(index: int, address: str) -> None:
    """Answer for it on that interface alone, whether the node has any route to it or not."""
    with IPRoute() as route:
        try:
            route.addr("replace", index=index, address=address, prefixlen=32, scope=_SCOPE_LINK)
        except NetlinkError as error:
            raise FabricError(f"can't give interface {index} {address}: {error}") from error


def set_value(setting: str, value: str) -> None:
    """FabricError: there is no such setting, or no right to it."""
    try:
        (SETTINGS / setting).write_text(value)
    except OSError as error:
        raise FabricError(f"can't set net/{setting} to {value}: {error.strerror}") from error


def _ensure(setting: str, value: str) -> None:
    try:
        if (SETTINGS / setting).read_text().strip() == value:
            return
    except OSError as error:
        raise FabricError(f"can't read net/{setting}: {error.strerror}") from error
    set_value(setting, value)
    log.info("net/%s is %s now", setting, value)
