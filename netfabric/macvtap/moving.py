"""What both nodes are told when a guest on their uplinks moves. Synchronous; belongs into threads.

    source      prepare_departure   tunnel's end made; the uplink goes on taking the guest's MAC
                divert              a rule at the uplink: frames for the guest's MAC take the tunnel
                shut                its macvtap is down: the guest is paused
                reopen              all of that undone
    destination prepare_arrival     its macvtap is down, tunnel's end and forwarder made
                open_arrival        its macvtap is up: frames wait in it; so do those of the tunnel

    uplink ── macvtap (guest)       The kernel hands what one interface above an uplink sends to
          └── forwarder ◄─ tunnel   another one there: so the tunnel's frames reach the guest.

The rules are in a table of the tunnel's name at each end (`netfabric.leading`).
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from migrator.errors import FabricError
from migrator.model import DomainName, NicSpec
from migrator.ports import Tunnel
from netfabric import filters
from netfabric.bridge import tunnels
from netfabric.bridge.links import index_of, netlink
from netfabric.bridge.moving import ARRIVAL_QUEUE_FRAMES, offer_filler
from netfabric.frames import announcements, parse_mac
from netfabric.host_routes import set_up
from netfabric.leading import lead, tunnels_with_rules
from netfabric.macvtap.network import FORWARDER_NAME, MacvtapNetwork, uplink_of
from netfabric.moves import Arrival, Departure
from netfabric.taps import TUNNEL_NAME, be_mute, made_mac, tap_name, tunnel_name

_SOL_PACKET: Final = 263
_PACKET_ADD_MEMBERSHIP: Final = 1
_PACKET_MR_UNICAST: Final = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class MacvtapDeparture(Departure):
    """`claim` None: nothing can be forwarded."""

    claim: socket.socket | None
    """As long as it is open the uplink takes frames for the guest's MAC."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MacvtapArrival(Arrival):
    """`forwarder` None: nothing can be forwarded to it."""

    forwarder: str | None


def prepare_departure(
    network: MacvtapNetwork, domain: DomainName, nics: Sequence[NicSpec], tunnel: Tunnel
) -> tuple[tuple[MacvtapDeparture, ...], list[str]]:
    """The NICs, and why some can't be forwarded for."""
    departures: list[MacvtapDeparture] = []
    failures: list[str] = []
    for index, nic in enumerate(nics):
        tap_index = index_of(tap_name(domain, index))
        if tap_index is None:
            failures.append(f"NIC {nic.mac} has no macvtap here")
            continue
        name, claim = tunnel_name(domain, index), None
        try:
            _open_end(name, tunnel, index, nic)
            claim = _claim(network, nic)
        except FabricError as error:
            failures.append(str(error))
        departures.append(MacvtapDeparture(nic=nic, tap_index=tap_index, tunnel=name, claim=claim))
    return tuple(departures), failures


def divert(network: MacvtapNetwork, departures: Sequence[MacvtapDeparture]) -> None:
    for each in departures:
        if each.forwards and each.claim is not None:
            what = f"can't divert to {each.tunnel}"
            lead(each.tunnel, network.uplink, each.nic.mac, each.tunnel, what)


def shut(departures: Sequence[MacvtapDeparture]) -> None:
    for departure in departures:
        set_up(departure.tap_index, up=False)


def reopen(domain: DomainName, nics: Sequence[NicSpec]) -> None:
    """By names alone, so that a restarted agent can do it."""
    for index, _ in enumerate(nics):
        tap_index = index_of(tap_name(domain, index))
        if tap_index is not None:
            set_up(tap_index, up=True)
        _close(tunnel_name(domain, index))


def prepare_arrival(
    network: MacvtapNetwork, domain: DomainName, nics: Sequence[NicSpec], tunnel: Tunnel
) -> tuple[tuple[MacvtapArrival, ...], list[str]]:
    """The NICs, and why some can't be forwarded to."""
    arrivals: list[MacvtapArrival] = []
    failures: list[str] = []
    for index, nic in enumerate(nics):
        tap, name = tap_name(domain, index), tunnel_name(domain, index)
        tap_index = index_of(tap)
        if tap_index is None:
            failures.append(f"NIC {nic.mac} has no macvtap here")
            continue
        with netlink(f"can't prepare macvtap {tap}") as kernel:
            kernel.set_queue(tap_index, ARRIVAL_QUEUE_FRAMES)
        set_up(tap_index, up=False)
        forwarder: str | None = None
        try:
            _open_end(name, tunnel, index, nic)
            forwarder = _make_forwarder(network, name)
        except FabricError as error:
            failures.append(str(error))
        arrivals.append(
            MacvtapArrival(
                nic=nic,
                tap=tap,
                tap_index=tap_index,
                tunnel=name,
                frames=announcements(nic),
                forwarder=forwarder,
            )
        )
    return tuple(arrivals), failures


def open_arrival(arrivals: Sequence[MacvtapArrival]) -> None:
    """Before the macvtap is up the forwarder would send into the network."""
    for each in arrivals:
        set_up(each.tap_index, up=True)
        if each.forwarder is not None:
            offer_filler(each.forwarder, parse_mac(each.nic.mac))
            what = f"can't forward to {each.tap}"
            lead(each.tunnel, each.tunnel, each.nic.mac, each.forwarder, what)


def close_ends(ends: Sequence[Departure | Arrival]) -> tuple[int, int]:
    """Remove the tunnels; frames that came out of them, and that went in."""
    counted = tunnels.close_ends(ends, _close)
    give_up_claims([end for end in ends if isinstance(end, MacvtapDeparture)])
    return counted


def give_up_claims(departures: Sequence[MacvtapDeparture]) -> None:
    """As the end of this process would. Idempotent."""
    for departure in departures:
        if departure.claim is not None:
            departure.claim.close()


def remove_leftovers() -> None:
    """What an earlier agent left of unfinished moves."""
    with netlink("can't remove old tunnels") as kernel:
        names = [link.name for link in kernel.links()]
    found = {name for name in names if TUNNEL_NAME.fullmatch(name)}
    found |= {_tunnel_of(name) for name in names if FORWARDER_NAME.fullmatch(name)}
    for name in found | tunnels_with_rules():
        _close(name)


def _close(tunnel: str) -> None:
    """The rules first: they name the links."""
    table = filters.table_of(tunnel)
    filters.run(f"table netdev {table}\ndelete table netdev {table}\n", f"can't close {tunnel}")
    with netlink(f"can't remove tunnel {tunnel}") as kernel:
        for name in (_forwarder_of(tunnel), tunnel):
            link = kernel.find(name)
            if link is not None:
                kernel.delete(link)


def _open_end(name: str, tunnel: Tunnel, index: int, nic: NicSpec) -> None:
    _close(name)
    with tunnels.new_end(name, tunnel, index) as (kernel, link):
        kernel.set_mtu(link.index, nic.mtu_bytes)
        be_mute(name)


def _make_forwarder(network: MacvtapNetwork, tunnel: str) -> str:
    name = _forwarder_of(tunnel)
    with netlink(f"can't forward what comes by {tunnel}") as kernel:
        uplink = uplink_of(kernel, network)
        link = kernel.add(name, "macvlan", link=uplink.index, macvlan_mode="bridge")
        kernel.set_mac(link.index, made_mac(name))
        be_mute(name)
        kernel.raise_up(link)
    return name


def _claim(network: MacvtapNetwork, nic: NicSpec) -> socket.socket:
    with netlink(f"can't look at {network.uplink}") as kernel:
        index = uplink_of(kernel, network).index
    opened = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    try:
        request = struct.pack("iHH8s", index, _PACKET_MR_UNICAST, 6, parse_mac(nic.mac))
        opened.setsockopt(_SOL_PACKET, _PACKET_ADD_MEMBERSHIP, request)
    except OSError as error:
        opened.close()
        raise FabricError(f"{network.uplink} doesn't take {nic.mac}: {error.strerror}") from error
    return opened


def _forwarder_of(tunnel: str) -> str:
    return "fz" + tunnel[2:]


def _tunnel_of(forwarder: str) -> str:
    return "fx" + forwarder[2:]
