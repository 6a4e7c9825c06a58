"""What two nodes' routing tables are told when a guest moves. Synchronous; belongs into threads.

    source      prepare_departure   tunnel's end made, the addresses its neighbours
                divert              the addresses lead into the tunnel: one message each
                shut                the tap is down: the guest is paused
                reopen              all of that undone
    destination prepare_arrival     nothing leads to the tap, tunnel's end made
                open_arrival        the addresses lead to the tap: what comes waits in its queue

The tunnel is the same VXLAN as between bridges, without bridges: a route leads into it at the one
end, the kernel routes on at the other. Its ends' MACs differ, or the kernel would take its own
frame for a loop.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from migrator.errors import FabricError
from migrator.model import DomainName, NicSpec
from migrator.ports import Tunnel
from netfabric.bridge import tunnels
from netfabric.bridge.links import index_of, netlink
from netfabric.bridge.moving import ARRIVAL_QUEUE_FRAMES, offer_filler
from netfabric.frames import parse_mac
from netfabric.host_routes import Hop, Metric, set_neighbour, set_route, set_up
from netfabric.moves import Arrival, Departure
from netfabric.routed import plugging
from netfabric.routed.network import RoutedNetwork, addresses_of, be_router4, set_value
from netfabric.taps import made_mac, tap_name, tunnel_name

_AWAY: Final = "away"
_HERE: Final = "here"


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutedDeparture(Departure):
    """`tunnel_index` None: nothing can be forwarded."""

    tunnel_index: int | None


def prepare_departure(
    domain: DomainName, nics: Sequence[NicSpec], tunnel: Tunnel
) -> tuple[tuple[RoutedDeparture, ...], list[str]]:
    """The NICs, and why some can't be forwarded for."""
    departures: list[RoutedDeparture] = []
    failures: list[str] = []
    for index, nic in enumerate(nics):
        tap_index = index_of(tap_name(domain, index))
        if tap_index is None:
            failures.append(f"NIC {nic.mac} has no tap here")
            continue
        name = tunnel_name(domain, index)
        end: int | None = None
        try:
            end = _open_end(name, tunnel, index, nic, _AWAY)
            for address in addresses_of(nic):
                set_neighbour(address, end, made_mac(f"{name}/{_HERE}"))
        except FabricError as error:
            failures.append(str(error))
        departures.append(
            RoutedDeparture(nic=nic, tap_index=tap_index, tunnel=name, tunnel_index=end)
        )
    return tuple(departures), failures


def divert(network: RoutedNetwork, departures: Sequence[RoutedDeparture]) -> None:
    for departure in departures:
        if departure.forwards and departure.tunnel_index is not None:
            for address in addresses_of(departure.nic):
                hop = Hop(departure.tunnel_index, source=network.hop_for(address))
                set_route(address, hop, Metric.HERE)


def shut(departures: Sequence[RoutedDeparture]) -> None:
    for departure in departures:
        set_up(departure.tap_index, up=False)


def reopen(network: RoutedNetwork, domain: DomainName, nics: Sequence[NicSpec]) -> None:
    """By names alone, so that a restarted agent can do it."""
    for index, nic in enumerate(nics):
        tap_index = index_of(tap_name(domain, index))
        if tap_index is not None:
            plugging.place(network, tap_index, nic, Metric.WAITING)
            plugging.lead(network, tap_index, nic)
        tunnels.close_end(tunnel_name(domain, index))


def prepare_arrival(
    domain: DomainName, nics: Sequence[NicSpec], tunnel: Tunnel
) -> tuple[tuple[Arrival, ...], list[str]]:
    """The NICs, and why some can't be forwarded to."""
    arrivals: list[Arrival] = []
    failures: list[str] = []
    for index, nic in enumerate(nics):
        tap, name = tap_name(domain, index), tunnel_name(domain, index)
        tap_index = index_of(tap)
        if tap_index is None:
            failures.append(f"NIC {nic.mac} has no tap here")
            continue
        with netlink(f"can't prepare tap {tap}") as kernel:
            kernel.set_queue(tap_index, ARRIVAL_QUEUE_FRAMES)
        plugging.keep_silent(nic)
        offer_filler(tap, parse_mac(nic.mac))
        arrivals.append(Arrival(nic=nic, tap=tap, tap_index=tap_index, tunnel=name))
        try:
            _open_end(name, tunnel, index, nic, _HERE)
        except FabricError as error:
            failures.append(str(error))
    return tuple(arrivals), failures


def open_arrival(network: RoutedNetwork, arrivals: Sequence[Arrival]) -> None:
    for arrival in arrivals:
        plugging.lead(network, arrival.tap_index, arrival.nic)


def _open_end(name: str, tunnel: Tunnel, index: int, nic: NicSpec, role: str) -> int:
    """Make one end; its interface index. An older one goes. FabricError: none is left."""
    with tunnels.new_end(name, tunnel, index) as (kernel, link):
        kernel.set_mac(link.index, made_mac(f"{name}/{role}"))
        kernel.set_mtu(link.index, nic.mtu_bytes)
        be_router4(name, link.index)
        with contextlib.suppress(FabricError):  # a kernel without IPv6
            set_value(f"ipv6/conf/{name}/addr_gen_mode", "1")
            set_value(f"ipv6/conf/{name}/forwarding", "1")
    return link.index
