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

import threading
import time
from collections.abc import Sequence
from typing import ClassVar

from migrator.errors import FabricError
from migrator.model import DomainName, NicSpec
from migrator.ports import ProbeReport, Tunnel, WidthReport
from netfabric.announcer import GAPS_S
from netfabric.bridge import announcing, moving, plugging, tunnels
from netfabric.bridge.announcing import Announced
from netfabric.bridge.links import Exits, shut_in
from netfabric.bridge.moving import BridgeArrival, BridgeDeparture
from netfabric.bridge.plugging import Tap
from netfabric.exits import Exit
from netfabric.frames import announcements, parse_mac
from netfabric.kernel_fabric import KernelFabric
from netfabric.moves import Arrival, Departure
from netfabric.taps import tap_name
from netfabric.threads import in_thread


class BridgeFabric(KernelFabric[BridgeDeparture, BridgeArrival]):
    """Taps on the bridges of this process's network namespace. Needs CAP_NET_ADMIN and _NET_RAW.

    Belongs to one event loop. Errors: FabricError.
    """

    name: ClassVar[str] = "bridge"
    _pins = True
    """Whether a moving guest's MAC is pinned: somebody may speak in its name at its old place."""

    def __init__(self, *, gaps_s: Sequence[float] = GAPS_S) -> None:
        """`gaps_s`: between the rounds of an announcement, seconds."""
        super().__init__(gaps_s)
        self._ended: dict[DomainName, threading.Event] = {}
        self._exits: dict[str, Exits] = {}

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
        await self._watch(tap, nic)
        return fd

    async def unplug(self, domain: DomainName, index: int) -> None:
        self._exits.pop(tap_name(domain, index), None)
        await super().unplug(domain, index)

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
        for ended in self._ended.values():
            ended.set()
        self._ended.clear()
        await super().close()

    # --- a domain that moves ---

    def announce_now(self, domain: DomainName) -> float | None:
        at_s: float | None = None
        if self._socket is not None:
            for arrival in self._arrivals.get(domain, ()):
                if announcing.send(self._socket, arrival.exits.uplinks, arrival.frames):
                    at_s = at_s or time.time()
        return at_s

    async def probe(self, nic: NicSpec, timeout_s: float) -> ProbeReport:
        return await in_thread(lambda: moving.probe_from_bridge(nic, timeout_s))

    async def send_wide(self, nic: NicSpec, token: bytes) -> None:
        await in_thread(lambda: moving.send_wide(nic, token))

    async def hear_wide(self, nic: NicSpec, token: bytes, timeout_s: float) -> WidthReport:
        reason = await in_thread(lambda: shut_in(nic.bridge, nic.vlan))
        if reason:
            return WidthReport(cut_off=reason)
        return await in_thread(lambda: moving.hear_wide(nic, token, timeout_s))

    # --- what the kernel is told ---

    def _leave(
        self, domain: DomainName, nics: Sequence[NicSpec], tunnel: Tunnel
    ) -> tuple[tuple[BridgeDeparture, ...], list[str]]:
        return moving.prepare_departure(domain, nics, tunnel)

    def _divert(self, departures: Sequence[BridgeDeparture]) -> None:
        moving.divert(departures, pins=self._pins)

    def _shut(self, departures: Sequence[BridgeDeparture]) -> None:
        moving.shut(departures)

    def _reopen(self, domain: DomainName, nics: Sequence[NicSpec]) -> None:
        moving.reopen(domain, nics)

    def _come(
        self, domain: DomainName, nics: Sequence[NicSpec], tunnel: Tunnel
    ) -> tuple[tuple[BridgeArrival, ...], list[str]]:
        known = [self._exits.get(tap_name(domain, index)) for index in range(len(nics))]
        return moving.prepare_arrival(domain, nics, tunnel, known)

    def _open(self, arrivals: Sequence[BridgeArrival]) -> None:
        moving.open_arrival(arrivals, pins=self._pins)

    def _close(self, ends: Sequence[Departure | Arrival]) -> tuple[int, int]:
        return tunnels.close_ends(ends)

    def _remove(self, tap: str) -> None:
        plugging.unplug(tap)

    # --- inside ---

    async def _silence(self, domain: DomainName) -> None:
        ended = self._ended.pop(domain, None)
        if ended is not None:
            ended.set()
        await super()._silence(domain)


async def list_taps() -> Sequence[Tap]:
    """Every tap of this namespace that is named as ours are: what runs, or what was left over."""
    return await in_thread(plugging.list_taps)
