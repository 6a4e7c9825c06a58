"""A routed NIC's tap: it answers for everybody, and its guest's addresses lead to it.

    ip route   10.0.0.5 dev TAP metric 2048      (WAITING; HERE, 1, once the guest is here)
    ip neigh   10.0.0.5 dev TAP MAC permanent    no question is asked, so none waits
    proxy_arp, proxy_ndp, fe80::1                its guest's own questions are answered at once

The tap's MAC is made of the guest's, so it is the same on every node: what the guest has in its
own caches stays right when it moves. Synchronous; belongs into a thread.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from migrator.errors import FabricError
from migrator.model import NicSpec
from netfabric import filters
from netfabric.bridge.links import Netlink, netlink
from netfabric.frames import parse_mac
from netfabric.host_routes import (
    Hop,
    Metric,
    answer_for,
    remove_route,
    set_neighbour,
    set_route,
    set_up,
)
from netfabric.link_table import Link
from netfabric.routed.network import (
    GATEWAY6,
    RoutedNetwork,
    addresses_of,
    be_router4,
    give_address4,
    reasons,
    set_value,
)
from netfabric.taps import host_side_mac, open_tap


def plug(network: RoutedNetwork, tap: str, nic: NicSpec) -> int:
    """The tap's descriptor. FabricError: nothing is left."""
    found = reasons(network, nic)
    if found:
        raise FabricError("; ".join(found))
    fd = open_tap(tap)
    try:
        filters.apply(tap, nic)
        with netlink(f"can't plug tap {tap}") as kernel:
            link = kernel.find(tap)
            if link is None:
                raise FabricError(f"tap {tap} was removed by somebody else")
            kernel.set_mac(link.index, host_side_mac(parse_mac(nic.mac)))
            kernel.set_mtu(link.index, nic.mtu_bytes)
            if nic.receive_limit_bytes_per_s is not None:
                rate = nic.receive_limit_bytes_per_s
                kernel.limit(
                    link.index,
                    rate,
                    burst_bytes=filters.burst_bytes(rate),
                    queue_bytes=filters.queue_bytes(rate),
                )
            _settle(kernel, link, nic)
        place(network, link.index, nic, Metric.WAITING)
    except BaseException:
        os.close(fd)
        if filters.wanted(nic):
            with contextlib.suppress(FabricError):
                filters.remove(tap)
        raise
    return fd


def _settle(kernel: Netlink, link: Link, nic: NicSpec) -> None:
    """The kernel's own behaviour on the tap, before it is up."""
    name = link.name
    set_value(f"ipv4/conf/{name}/proxy_arp", "1")
    set_value(f"ipv4/neigh/{name}/proxy_delay", "0")
    be_router4(name, link.index)
    if any(address.version == 6 for address in addresses_of(nic)):
        for setting, value in (
            ("disable_ipv6", "0"),
            ("forwarding", "1"),
            ("proxy_ndp", "1"),
            ("accept_ra", "0"),
            ("accept_dad", "0"),
            ("addr_gen_mode", "1"),
        ):
            set_value(f"ipv6/conf/{name}/{setting}", value)
        set_value(f"ipv6/neigh/{name}/proxy_delay", "0")
    else:
        with contextlib.suppress(FabricError):  # a kernel without IPv6
            set_value(f"ipv6/conf/{name}/disable_ipv6", "1")
    kernel.raise_up(link)


def place(network: RoutedNetwork, index: int, nic: NicSpec, metric: Metric) -> None:
    """The tap is up, is its guest's router, and the guest's addresses lead to it. Idempotent."""
    set_up(index, up=True)
    addresses = addresses_of(nic)
    gateways = [ipaddress.ip_address(text) for text in network.gateways]
    if any(address.version == 6 for address in addresses):
        _be_router6(index)
    for gateway in gateways:
        if any(address.version == gateway.version for address in addresses):
            if gateway.version == 4:  # As a proxy the kernel answers only where it has a route.
                give_address4(index, str(gateway))
            else:
                answer_for(gateway, index)
    mac = parse_mac(nic.mac)
    for address in addresses:
        set_neighbour(address, index, mac)
        set_route(address, Hop(index, source=network.hop_for(address)), metric)


def _be_router6(index: int) -> None:
    with IPRoute() as route:
        try:
            route.addr("replace", index=index, address=GATEWAY6, prefixlen=64, flags=0x02)  # nodad
        except NetlinkError as error:
            raise FabricError(f"can't give the tap {GATEWAY6}: {error}") from error


def lead(network: RoutedNetwork, index: int, nic: NicSpec) -> None:
    """The addresses lead to the tap, whatever other nodes say. Fast: the guest stands still."""
    for address in addresses_of(nic):
        set_route(address, Hop(index, source=network.hop_for(address)), Metric.HERE)


def keep_silent(nic: NicSpec) -> None:
    """Nothing leads to the tap yet: its guest runs elsewhere."""
    for address in addresses_of(nic):
        remove_route(address, Metric.WAITING)


def close(fd: int) -> None:
    """For whoever doesn't want it any more. Its rules go with the next sweep."""
    os.close(fd)
