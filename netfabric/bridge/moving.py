"""What the bridges of both nodes are told when a guest moves. Synchronous; belongs into threads.

    source      prepare_departure   tunnel's end made, a port of the tap's bridge
                divert              the guest's MAC is pinned to the tunnel; its tap hears no floods
                                    and is learnt from no more (the guest still runs, and may send)
                shut                the tap's port is disabled: the guest is paused
                reopen              all of that undone
    destination prepare_arrival     tap hears no floods, tunnel's end made
                open_arrival        tap hears floods; the guest's MAC is pinned to it, since the
                                    uplink still hears the guest for some ms

`divert` comes before the pause and not with it, so that the guest still reads what is in its tap:
a frame that reaches the tap of a paused guest is lost. Frames that take the tunnel wait in the
destination's tap, as many as its queue holds, until the guest runs there.

Pinned entries are given up by `learn`, which the announcement does, and by the tunnel's end.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from migrator.errors import FabricError
from migrator.model import DomainName, NicSpec
from migrator.ports import ProbeReport, Tunnel, WidthReport
from netfabric import wide_frames
from netfabric.bridge import tunnels
from netfabric.bridge.links import (
    Exits,
    Uplink,
    bridge_uplinks,
    find_exits,
    index_of,
    netlink,
)
from netfabric.frames import ETHERTYPE_EXPERIMENTAL, announcements, ethernet, parse_mac
from netfabric.moves import Arrival, Departure
from netfabric.netlink_format import PortState
from netfabric.probing import probe, probing_mac
from netfabric.rtnetlink import learn, pin, set_port, set_port_state
from netfabric.taps import host_side_mac, tap_name, tunnel_name

ARRIVAL_QUEUE_FRAMES: Final = 4096
"""Of a tap whose guest is on its way: 50 ms at 80,000 frames/s."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BridgeDeparture(Departure):
    """`tunnel_index` None: nothing can be forwarded."""

    tunnel_index: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class BridgeArrival(Arrival):
    """And where its announcement leaves."""

    exits: Exits


def prepare_departure(
    domain: DomainName, nics: Sequence[NicSpec], tunnel: Tunnel
) -> tuple[tuple[BridgeDeparture, ...], list[str]]:
    """The NICs, and why some can't be forwarded for."""
    departures: list[BridgeDeparture] = []
    failures: list[str] = []
    for index, nic in enumerate(nics):
        tap = tap_name(domain, index)
        tap_index = index_of(tap)
        if tap_index is None:
            failures.append(f"NIC {nic.mac} has no tap here")
            continue
        name = tunnel_name(domain, index)
        end: int | None = None
        try:
            end = tunnels.open_end(name, tunnel, index, nic)
        except FabricError as error:
            failures.append(str(error))
        departures.append(
            BridgeDeparture(nic=nic, tap_index=tap_index, tunnel=name, tunnel_index=end)
        )
    return tuple(departures), failures


def divert(departures: Sequence[BridgeDeparture], *, pins: bool = True) -> None:
    """`pins`: the bridge keeps the entry, whatever it hears. Not so where somebody else sets it.

    Where nothing can be forwarded the guest reads on what is sent to its MAC, until it is paused.
    """
    for departure in departures:
        if departure.forwards and departure.tunnel_index is not None:
            (pin if pins else learn)(departure.tunnel_index, parse_mac(departure.nic.mac))
        set_port(departure.tap_index, floods=False, learns=False)


def shut(departures: Sequence[BridgeDeparture]) -> None:
    for departure in departures:
        with contextlib.suppress(FabricError):  # a spanning tree's, or gone: nothing learns it
            set_port_state(departure.tap_index, PortState.DISABLED)


def reopen(domain: DomainName, nics: Sequence[NicSpec]) -> None:
    """By names alone, so that a restarted agent can do it."""
    for index, nic in enumerate(nics):
        tap = tap_name(domain, index)
        with netlink(f"can't look at tap {tap}") as kernel:
            link = kernel.find(tap)
        if link is not None and link.master is not None:
            with contextlib.suppress(FabricError):  # as in `shut`
                set_port_state(link.index, PortState.FORWARDING)
            set_port(link.index, floods=True, learns=True)
            learn(link.index, parse_mac(nic.mac))
        tunnels.close_end(tunnel_name(domain, index))


def prepare_arrival(
    domain: DomainName, nics: Sequence[NicSpec], tunnel: Tunnel, known: Sequence[Exits | None]
) -> tuple[tuple[BridgeArrival, ...], list[str]]:
    """The NICs, and why some can't be forwarded to."""
    arrivals: list[BridgeArrival] = []
    failures: list[str] = []
    for index, (nic, exits) in enumerate(zip(nics, known, strict=True)):
        tap, name = tap_name(domain, index), tunnel_name(domain, index)
        with netlink(f"can't prepare tap {tap}") as kernel:
            exits = exits or find_exits(kernel, tap)  # noqa: PLW2901
            if exits is not None:
                kernel.set_queue(exits.tap_index, ARRIVAL_QUEUE_FRAMES)
        if exits is None:
            failures.append(f"NIC {nic.mac} has no tap here")
            continue
        set_port(exits.tap_index, floods=False, learns=False)
        offer_filler(tap, parse_mac(nic.mac))
        arrivals.append(
            BridgeArrival(
                nic=nic,
                tap=tap,
                tap_index=exits.tap_index,
                tunnel=name,
                frames=announcements(nic),
                exits=exits,
            )
        )
        try:
            tunnels.open_end(name, tunnel, index, nic)
        except FabricError as error:
            failures.append(str(error))
    return tuple(arrivals), failures


def offer_filler(tap: str, mac: bytes) -> None:
    """Put a frame that nobody needs first into a tap whose guest is to come.

    A paused QEMU reads one frame from its tap and loses it when it resumes (7.2: its network layer
    hands it on before the device is ready for it, which counts as delivered); the others it leaves
    in the tap. So that one frame shall not be a real one. A guest that gets it ignores it.
    """
    frame = ethernet(mac, host_side_mac(mac), ETHERTYPE_EXPERIMENTAL, b"")
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0) as sender:
        sender.setblocking(False)
        with contextlib.suppress(OSError):
            sender.sendto(frame, (tap, 0))


def open_arrival(arrivals: Sequence[BridgeArrival], *, pins: bool = True) -> None:
    """`pins`: as in `divert`."""
    for arrival in arrivals:
        (pin if pins else learn)(arrival.tap_index, parse_mac(arrival.nic.mac))
        set_port(arrival.tap_index, floods=True, learns=True)


def probe_from_bridge(nic: NicSpec, timeout_s: float) -> ProbeReport:
    """Ask by every uplink of the NIC's bridge on this node."""
    uplinks = _uplinks_of(nic)
    if not uplinks:
        return ProbeReport(able=False, detail=f"bridge {nic.bridge} has no uplink here")
    own_mac = probing_mac(uplinks[0].mac)
    learnt_at = _learnt_at(nic)
    return probe(nic, [uplink.exit for uplink in uplinks], own_mac, timeout_s, learnt_at)


def send_wide(nic: NicSpec, token: bytes) -> None:
    """Test frames by every uplink of the NIC's bridge. FabricError: one takes no full frame."""
    uplinks = _uplinks_of(nic)
    if uplinks:
        ways = [uplink.exit for uplink in uplinks]
        wide_frames.send(ways, probing_mac(uplinks[0].mac), token, nic.mtu_bytes)


def hear_wide(nic: NicSpec, token: bytes, timeout_s: float) -> WidthReport:
    """Listen for them on every uplink of the NIC's bridge."""
    ways = [uplink.exit for uplink in _uplinks_of(nic)]
    return wide_frames.hear(ways, token, nic.mtu_bytes, timeout_s)


def _uplinks_of(nic: NicSpec) -> list[Uplink]:
    """The ways into the NIC's network, none if it isn't here."""
    with netlink(f"can't look at bridge {nic.bridge}") as kernel:
        bridge = kernel.find(nic.bridge)
        if bridge is None or bridge.kind != "bridge":
            return []
        return bridge_uplinks(kernel, bridge, nic.vlan)


def _learnt_at(nic: NicSpec) -> str:
    """Where the bridge has the NIC's MAC, as learnt; "" if it has none."""
    with netlink(f"can't look at bridge {nic.bridge}") as kernel:
        bridge = kernel.find(nic.bridge)
        return "" if bridge is None else kernel.learnt_at(bridge, nic.mac, nic.vlan)
