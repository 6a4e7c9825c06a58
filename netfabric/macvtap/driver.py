"""Guests above a node's uplink, each with a macvtap of its own: no bridge, nothing to learn.

                   this node                              network
    guest ── macvtap ─┬─ uplink ───────────────────── switch ── everybody else
    guest ── macvtap ─┘   (bridge mode: guests of one node reach each other)

The uplink knows the MACs above it, so a move leaves only one wrong table, the switch's: an
announcement leaves by the uplink, and that is all. The node itself can't reach its guests (the
kernel passes nothing between an uplink and what is above it), nor does it need to.

A macvtap outlives the hypervisor that had it, other than a tap: `closings` hears of the last close
of its device, and it is removed then; what dies without an agent is removed when one starts.

Needs CAP_NET_ADMIN, CAP_NET_RAW and CAP_MKNOD. Belongs to one event loop. Errors: FabricError.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections.abc import Sequence
from typing import ClassVar

from migrator.errors import FabricError
from migrator.model import DomainName, NicSpec
from migrator.ports import FabricDriver, FirstFrames, ProbeReport, Tunnel, WidthReport
from netfabric import wide_frames
from netfabric.addresses import AddressWatcher
from netfabric.announcer import GAPS_S, Announcer
from netfabric.bridge import announcing
from netfabric.bridge.links import netlink
from netfabric.bridge.plugging import sweep_rules
from netfabric.bridge.taps import tap_name
from netfabric.exits import Exit
from netfabric.first_frames import FirstFrameWatches
from netfabric.frames import announcements, parse_mac
from netfabric.host_routes import set_up
from netfabric.macvtap import moving, network
from netfabric.macvtap.closings import Closings
from netfabric.macvtap.network import MacvtapNetwork
from netfabric.probing import probe, probing_mac
from netfabric.threads import in_thread

log = logging.getLogger(__name__)


class MacvtapFabric(FabricDriver):
    """See the module."""

    name: ClassVar[str] = "macvtap"

    def __init__(self, network: MacvtapNetwork, *, gaps_s: Sequence[float] = GAPS_S) -> None:
        """`gaps_s`: between the rounds of an announcement, seconds."""
        self.network = network
        self._exit = Exit(network.uplink, addressed=True)
        self._announcer = Announcer(gaps_s)
        self._addresses = AddressWatcher(outgoing_to_guest=False)
        self._closings = Closings(self._on_closed)
        self._removals: set[asyncio.Task[None]] = set()
        self._socket: socket.socket | None = None
        self._first = FirstFrameWatches(outgoing_to_guest=False)
        self._departures: dict[DomainName, tuple[moving.Departure, ...]] = {}
        self._arrivals: dict[DomainName, tuple[moving.Arrival, ...]] = {}

    async def open(self) -> None:
        """Also removes the macvtaps of hypervisors that died without an agent."""
        await in_thread(moving.remove_leftovers)
        await in_thread(_sweep)

    async def check(self, nic: NicSpec) -> Sequence[str]:
        return await in_thread(lambda: network.reasons(self.network, nic))

    async def plug(self, domain: DomainName, index: int, nic: NicSpec) -> int:
        """The NIC's macvtap, up."""
        tap = tap_name(domain, index)
        plugging = in_thread(
            lambda: network.plug(self.network, tap, nic), lambda fd: network.give_up(fd, tap)
        )
        fd = await plugging
        await self._watch(tap, nic)
        return fd

    async def unplug(self, domain: DomainName, index: int) -> None:
        tap = tap_name(domain, index)
        await self._announcer.silence(domain)
        await self._addresses.forget(tap)
        await self._first.discard(domain)
        arrivals = self._arrivals.pop(domain, ())
        await in_thread(lambda: network.unplug(tap))
        await in_thread(lambda: moving.close_ends(arrivals))

    async def announce(self, domain: DomainName, nics: Sequence[NicSpec]) -> None:
        """One round by the uplink; the macvtaps are up when it returns."""
        await self._announcer.silence(domain)
        if not nics:
            return
        sender = self._packet_socket()
        here = await in_thread(lambda: _raise(domain, nics))
        frames = [frame for nic in here for frame in announcements(nic)]

        async def send() -> None:
            if not announcing.send(sender, [self._exit], frames):
                raise FabricError(f"{self.network.uplink} takes no frame")

        failures = [f"NIC {nic.mac} has no macvtap here" for nic in nics if nic not in here]
        if frames:
            try:
                await send()
            except FabricError as error:
                failures.append(str(error))
            await self._announcer.repeat(domain, send)
        if failures:
            raise FabricError("; ".join(failures))

    async def close(self) -> None:
        """End the announcements. The macvtaps stay: their hypervisors hold them."""
        await self._announcer.close()
        await self._addresses.close()
        await self._first.close()
        self._closings.close()
        moving.give_up_claims([each for every in self._departures.values() for each in every])
        if self._removals:
            await asyncio.wait(self._removals)
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    # --- a domain that moves ---

    async def prepare_departure(
        self, domain: DomainName, nics: Sequence[NicSpec], tunnel: Tunnel
    ) -> None:
        earlier = self._arrivals.pop(domain, ())
        await in_thread(lambda: moving.close_ends(earlier))
        departures, failures = await in_thread(
            lambda: moving.prepare_departure(self.network, domain, nics, tunnel),
            lambda made: _discard(made[0]),
        )
        self._departures[domain] = departures
        if failures:
            raise FabricError("; ".join(failures))

    async def divert(self, domain: DomainName) -> None:
        departures = self._departures.get(domain, ())
        await in_thread(lambda: moving.divert(self.network, departures))

    async def shut(self, domain: DomainName) -> None:
        departures = self._departures.get(domain, ())
        await in_thread(lambda: moving.shut(departures))

    async def reopen(self, domain: DomainName, nics: Sequence[NicSpec]) -> None:
        departures = self._departures.pop(domain, ())
        await in_thread(lambda: moving.reopen(domain, nics))
        await in_thread(lambda: moving.close_ends(departures))

    async def end_departure(self, domain: DomainName) -> int:
        departures = self._departures.pop(domain, ())
        return (await in_thread(lambda: moving.close_ends(departures)))[1]

    async def prepare_arrival(
        self, domain: DomainName, nics: Sequence[NicSpec], tunnel: Tunnel
    ) -> None:
        earlier = self._departures.pop(domain, ())
        await in_thread(lambda: moving.close_ends(earlier))
        arrivals, failures = await in_thread(
            lambda: moving.prepare_arrival(self.network, domain, nics, tunnel),
            lambda made: _discard(made[0]),
        )
        self._arrivals[domain] = arrivals
        self._packet_socket()
        if failures:
            raise FabricError("; ".join(failures))

    async def open_arrival(self, domain: DomainName, learnt: Sequence[Sequence[str]] = ()) -> None:
        arrivals = moving.with_addresses(self._arrivals.get(domain, ()), learnt)
        if arrivals:
            self._arrivals[domain] = arrivals
        for arrival in arrivals:
            self._addresses.add(arrival.tap, arrival.learnt)
        await in_thread(lambda: moving.open_arrival(arrivals))
        await self._first.open(domain, [arrival.tap for arrival in arrivals])

    def announce_now(self, domain: DomainName) -> float | None:
        at_s: float | None = None
        if self._socket is not None:
            for arrival in self._arrivals.get(domain, ()):
                if announcing.send(self._socket, [self._exit], arrival.frames):
                    at_s = at_s or time.time()
        return at_s

    async def end_arrival(self, domain: DomainName) -> int:
        arrivals = self._arrivals.pop(domain, ())
        await self._first.discard(domain)
        return (await in_thread(lambda: moving.close_ends(arrivals)))[0]

    async def first_frames(
        self, domain: DomainName, since_s: float, timeout_s: float
    ) -> FirstFrames:
        taps = [arrival.tap for arrival in self._arrivals.get(domain, ())]
        return await self._first.wait(domain, taps, since_s, timeout_s)

    async def probe(self, nic: NicSpec, timeout_s: float) -> ProbeReport:
        if nic.bridge != self.network.name:
            return ProbeReport(able=False, detail=f"there is no network {nic.bridge} here")

        def ask() -> ProbeReport:
            return probe(nic, [self._exit], self._own_mac(), timeout_s)

        return await in_thread(ask)

    async def send_wide(self, nic: NicSpec, token: bytes) -> None:
        def send() -> None:
            wide_frames.send([self._exit], self._own_mac(), token, nic.mtu_bytes)

        await in_thread(send)

    async def hear_wide(self, nic: NicSpec, token: bytes, timeout_s: float) -> WidthReport:
        return await in_thread(
            lambda: wide_frames.hear([self._exit], token, nic.mtu_bytes, timeout_s)
        )

    # --- addresses ---

    async def watch(self, domain: DomainName, nics: Sequence[NicSpec]) -> None:
        for index, nic in enumerate(nics):
            await self._watch(tap_name(domain, index), nic)

    def learnt(self, domain: DomainName, nics: Sequence[NicSpec]) -> Sequence[tuple[str, ...]]:
        return [self._addresses.learnt(tap_name(domain, index)) for index, _ in enumerate(nics)]

    def addresses_here(self) -> frozenset[str]:
        return self._addresses.known()

    # --- inside ---

    async def _watch(self, tap: str, nic: NicSpec) -> None:
        """Nothing that runs depends on it: a watch that fails is logged."""
        try:
            self._addresses.watch(tap, parse_mac(nic.mac), nic.addresses)
            found = await in_thread(lambda: network.node_of(tap))
            if found is not None:
                index, node = found
                self._closings.watch((tap, index), node)
        except FabricError as error:
            log.warning("NIC %s isn't watched: %s", nic.mac, error)

    def _on_closed(self, closed: tuple[str, int]) -> None:
        tap, index = closed

        async def remove() -> None:
            try:
                await in_thread(lambda: network.remove_if_unheld(tap, index))
            except FabricError as error:
                log.warning("macvtap %s is left over: %s", tap, error)

        task = asyncio.create_task(remove(), name=f"remove {tap}")
        self._removals.add(task)
        task.add_done_callback(self._removals.discard)

    def _own_mac(self) -> bytes:
        with netlink(f"can't look at {self.network.uplink}") as kernel:
            return probing_mac(network.uplink_of(kernel, self.network).mac)

    def _packet_socket(self) -> socket.socket:
        """Protocol 0: it receives nothing."""
        if self._socket is None:
            try:
                self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
            except OSError as error:
                raise FabricError(f"can't open a packet socket: {error.strerror}") from error
            self._socket.setblocking(False)
        return self._socket


def _sweep() -> None:
    network.sweep()
    sweep_rules({link.name for link in network.macvtaps()})


def _raise(domain: DomainName, nics: Sequence[NicSpec]) -> list[NicSpec]:
    """The NICs that have a macvtap here; it is up."""
    found: list[NicSpec] = []
    for index, nic in enumerate(nics):
        tap_index = moving.tap_index_of(domain, index)
        if tap_index is not None:
            set_up(tap_index, up=True)
            found.append(nic)
    return found


def _discard(ends: Sequence[moving.Departure | moving.Arrival]) -> None:
    moving.close_ends(ends)
