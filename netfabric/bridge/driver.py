"""Taps on Linux bridges, and the announcement that a guest is here now.

                      this node                              network
    guest ── tap ── bridge ── uplink ───────────────── switch ── everybody else
                      │  └─── other guests' taps
                      └ learnt MACs: "the guest is behind the uplink", until told otherwise

After a move two tables are wrong: the switch's, which sends the guest's frames to its old node,
and this node's bridge's, which heard the guest by the uplink while it ran elsewhere. Where to
inject an announcement was decided by trying, with a guest's MAC that both had last seen beyond
the uplink:

    sent on                  bridge then says   switch learns   who hears it
    the tap                  uplink (wrong)     no              only the guest itself
    the bridge device        uplink (wrong)     yes             all, the guest itself too
    the tap's descriptor     tap                yes             all but the guest
    each other port, and
      the bridge is told     tap                yes             all but the guest

Writing to the tap's descriptor is what a guest does, but it is QEMU's: a copy kept here would
keep the tap alive after its hypervisor's death, a second queue would be handed a part of the
guest's traffic, and after the agent's restart both are gone. A guest that hears its own
advertisement reports a duplicate address. So the last row: raw frames out of every other
forwarding port of the bridge (in the tap's VLAN), and the bridge's table set by rtnetlink. It
needs nothing but names, gives the same tables as a guest's own frame, and a real frame from
elsewhere moves the entry again.

The uplinks of a tap are looked up when it is plugged, so that an announcement's first frames go
out at once, from the event loop: one non-blocking packet socket, no netlink before them.

Two limits. Every NIC's bridge and the agent must share a network namespace. A source that is about
to give a guest away must not go on announcing it: `announce(domain, ())` ends the repeats.
"""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Sequence
from typing import ClassVar

from migrator.errors import FabricError
from migrator.model import DomainName, NicSpec
from migrator.ports import FabricDriver, FirstFrames, ProbeReport, Tunnel, WidthReport
from netfabric.addresses import AddressWatcher
from netfabric.announcer import GAPS_S, Announcer
from netfabric.bridge import announcing, moving, plugging, tunnels
from netfabric.bridge.announcing import Announced
from netfabric.bridge.links import Exits
from netfabric.bridge.plugging import Tap
from netfabric.bridge.taps import tap_name
from netfabric.exits import Exit
from netfabric.first_frames import FirstFrameWatches
from netfabric.frames import announcements, parse_mac
from netfabric.threads import in_thread

_log = logging.getLogger(__name__)


class BridgeFabric(FabricDriver):
    """Taps on the bridges of this process's network namespace. Needs CAP_NET_ADMIN and _NET_RAW.

    Belongs to one event loop. Errors: FabricError.
    """

    name: ClassVar[str] = "bridge"
    _pins = True
    """Whether a moving guest's MAC is pinned: somebody may speak in its name at its old place."""

    def __init__(self, *, gaps_s: Sequence[float] = GAPS_S) -> None:
        """`gaps_s`: between the rounds of an announcement, seconds."""
        self._announcer = Announcer(gaps_s)
        self._ended: dict[DomainName, threading.Event] = {}
        self._exits: dict[str, Exits] = {}
        self._socket: socket.socket | None = None
        self._addresses = AddressWatcher()
        self._first = FirstFrameWatches()
        self._departures: dict[DomainName, tuple[moving.Departure, ...]] = {}
        self._arrivals: dict[DomainName, tuple[moving.Arrival, ...]] = {}

    async def open(self) -> None:
        """Remove the tunnels, and the rules of taps long gone, that an earlier agent left."""
        await in_thread(tunnels.remove_leftovers)
        await in_thread(plugging.sweep)

    async def check(self, nic: NicSpec) -> Sequence[str]:
        """Why this NIC can't be plugged here; empty if it can. Changes nothing."""
        return await in_thread(lambda: plugging.reasons(nic))

    async def plug(self, domain: DomainName, index: int, nic: NicSpec) -> int:
        """Make the NIC's tap, a port of its bridge, up. The caller owns the descriptor.

        FabricError: what `check` says, or a tap of this NIC is held by a process already.
        On failure and on cancellation no tap is left.
        """
        tap = tap_name(domain, index)
        fd, exits = await in_thread(lambda: plugging.plug(tap, nic), plugging.close_plugged)
        self._exits[tap] = exits
        self._watch(tap, nic)
        return fd

    async def unplug(self, domain: DomainName, index: int) -> None:
        """Remove the tap, also from under a hypervisor that holds it. Ends announcements.

        A tunnel that still leads from this node to the domain's new one stays, for its time.
        """
        tap = tap_name(domain, index)
        await self._silence(domain)
        self._exits.pop(tap, None)
        await self._addresses.forget(tap)
        await self._first.discard(domain)
        arrivals = self._arrivals.pop(domain, ())
        await in_thread(lambda: plugging.unplug(tap))
        await in_thread(lambda: moving.close_tunnels(arrivals))

    async def announce(self, domain: DomainName, nics: Sequence[NicSpec]) -> None:
        """Say where the NICs are. On return a first round is out and the bridge knows the taps.

        The rounds that follow end by themselves after the sum of the gaps, and by `unplug`,
        `close` or the domain's next `announce`, with no NICs too. FabricError: a NIC has no tap
        here, or no frame could be sent. The other NICs are announced nevertheless, and repeated.
        """
        await self._silence(domain)
        announced = [
            Announced(
                tap=tap_name(domain, index), mac=parse_mac(nic.mac), frames=announcements(nic)
            )
            for index, nic in enumerate(nics)
        ]
        if not announced:
            return
        sender = self._packet_socket()
        ended = self._ended[domain] = threading.Event()
        known = {one.tap: self._exits[one.tap] for one in announced if one.tap in self._exits}
        sent: dict[str, tuple[Exit, ...]] = {}
        for one in announced:
            if one.tap in known:
                sent[one.tap] = announcing.send(sender, known[one.tap].uplinks, one.frames)

        async def repeat() -> None:
            await in_thread(lambda: announcing.repeat(sender, announced, ended))

        failure: FabricError | None = None
        try:
            await in_thread(lambda: announcing.first_round(sender, announced, known, sent, ended))
        except FabricError as error:
            failure = error
        except BaseException:
            ended.set()
            raise
        if not ended.is_set():
            await self._announcer.repeat(domain, repeat)
        if failure is not None:
            raise failure

    async def close(self) -> None:
        """End the announcements. Taps stay. Idempotent; the driver can be used again."""
        for ended in self._ended.values():
            ended.set()
        self._ended.clear()
        await self._announcer.close()
        await self._addresses.close()
        await self._first.close()
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    # --- a domain that moves ---

    async def prepare_departure(
        self, domain: DomainName, nics: Sequence[NicSpec], tunnel: Tunnel
    ) -> None:
        """FabricError: some NIC can't be forwarded for. It departs all the same."""
        earlier = self._arrivals.pop(domain, ())
        await in_thread(lambda: moving.discard(earlier))
        departures, failures = await in_thread(
            lambda: moving.prepare_departure(domain, nics, tunnel),
            lambda made: moving.discard(made[0]),
        )
        self._departures[domain] = departures
        if failures:
            raise FabricError("; ".join(failures))

    async def divert(self, domain: DomainName) -> None:
        departures = self._departures.get(domain, ())
        await in_thread(lambda: moving.divert(departures, pins=self._pins))

    async def shut(self, domain: DomainName) -> None:
        departures = self._departures.get(domain, ())
        await in_thread(lambda: moving.shut(departures))

    async def reopen(self, domain: DomainName, nics: Sequence[NicSpec]) -> None:
        self._departures.pop(domain, None)
        await in_thread(lambda: moving.reopen(domain, nics))

    async def end_departure(self, domain: DomainName) -> int:
        departures = self._departures.pop(domain, ())
        return (await in_thread(lambda: moving.close_tunnels(departures)))[1]

    async def prepare_arrival(
        self, domain: DomainName, nics: Sequence[NicSpec], tunnel: Tunnel
    ) -> None:
        """FabricError: some NIC can't be forwarded to. It arrives all the same."""
        earlier = self._departures.pop(domain, ())
        await in_thread(lambda: moving.discard(earlier))
        known = [self._exits.get(tap_name(domain, index)) for index in range(len(nics))]
        arrivals, failures = await in_thread(
            lambda: moving.prepare_arrival(domain, nics, tunnel, known),
            lambda made: moving.discard(made[0]),
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
        await in_thread(lambda: moving.open_arrival(arrivals, pins=self._pins))
        await self._first.open(domain, [arrival.tap for arrival in arrivals])

    def announce_now(self, domain: DomainName) -> float | None:
        at_s: float | None = None
        if self._socket is not None:
            for arrival in self._arrivals.get(domain, ()):
                if announcing.send(self._socket, arrival.exits.uplinks, arrival.frames):
                    at_s = at_s or time.time()
        return at_s

    async def end_arrival(self, domain: DomainName) -> int:
        arrivals = self._arrivals.pop(domain, ())
        await self._first.discard(domain)
        return (await in_thread(lambda: moving.close_tunnels(arrivals)))[0]

    async def first_frames(
        self, domain: DomainName, since_s: float, timeout_s: float
    ) -> FirstFrames:
        taps = [arrival.tap for arrival in self._arrivals.get(domain, ())]
        return await self._first.wait(domain, taps, since_s, timeout_s)

    async def probe(self, nic: NicSpec, timeout_s: float) -> ProbeReport:
        return await in_thread(lambda: moving.probe_from_bridge(nic, timeout_s))

    async def send_wide(self, nic: NicSpec, token: bytes) -> None:
        await in_thread(lambda: moving.send_wide(nic, token))

    async def hear_wide(self, nic: NicSpec, token: bytes, timeout_s: float) -> WidthReport:
        return await in_thread(lambda: moving.hear_wide(nic, token, timeout_s))

    # --- addresses ---

    async def watch(self, domain: DomainName, nics: Sequence[NicSpec]) -> None:
        for index, nic in enumerate(nics):
            self._watch(tap_name(domain, index), nic)

    def learnt(self, domain: DomainName, nics: Sequence[NicSpec]) -> Sequence[tuple[str, ...]]:
        return [self._addresses.learnt(tap_name(domain, index)) for index, _ in enumerate(nics)]

    def addresses_here(self) -> frozenset[str]:
        return self._addresses.known()

    # --- inside ---

    def _watch(self, tap: str, nic: NicSpec) -> None:
        """Nothing depends on it: a watch that fails is logged."""
        try:
            self._addresses.watch(tap, parse_mac(nic.mac), nic.addresses)
        except FabricError as error:
            _log.warning("addresses of NIC %s aren't learnt: %s", nic.mac, error)

    async def _silence(self, domain: DomainName) -> None:
        ended = self._ended.pop(domain, None)
        if ended is not None:
            ended.set()
        await self._announcer.silence(domain)

    def _packet_socket(self) -> socket.socket:
        """One socket for all ports. Protocol 0: it receives nothing."""
        if self._socket is None:
            try:
                self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
            except OSError as error:
                raise FabricError(f"can't open a packet socket: {error.strerror}") from error
            self._socket.setblocking(False)
        return self._socket


async def list_taps() -> Sequence[Tap]:
    """Every tap of this namespace that is named as ours are: what runs, or what was left over."""
    return await in_thread(plugging.list_taps)
