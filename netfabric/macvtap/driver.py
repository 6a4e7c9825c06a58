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
import time
from collections.abc import Sequence
from typing import ClassVar

from migrator.errors import FabricError
from migrator.model import DomainName, NicSpec
from migrator.ports import ProbeReport, Tunnel, WidthReport
from netfabric import wide_frames
from netfabric.announcer import GAPS_S
from netfabric.bridge import announcing
from netfabric.bridge.links import index_of, netlink
from netfabric.bridge.plugging import sweep_rules
from netfabric.exits import Exit
from netfabric.frames import announcements
from netfabric.host_routes import set_up
from netfabric.kernel_fabric import KernelFabric
from netfabric.macvtap import moving, network
from netfabric.macvtap.closings import Closings
from netfabric.macvtap.moving import MacvtapArrival, MacvtapDeparture
from netfabric.macvtap.network import MacvtapNetwork
from netfabric.moves import Arrival, Departure
from netfabric.probing import probe, probing_mac
from netfabric.taps import tap_name
from netfabric.threads import in_thread

log = logging.getLogger(__name__)


class MacvtapFabric(KernelFabric[MacvtapDeparture, MacvtapArrival]):
    """See the module."""

    name: ClassVar[str] = "macvtap"

    def __init__(self, network: MacvtapNetwork, *, gaps_s: Sequence[float] = GAPS_S) -> None:
        """`gaps_s`: between the rounds of an announcement, seconds."""
        super().__init__(gaps_s, outgoing_to_guest=False)
        self.network = network
        self._exit = Exit(network.uplink, addressed=True)
        self._closings = Closings(self._on_closed)
        self._removals: set[asyncio.Task[None]] = set()

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

    async def announce(self, domain: DomainName, nics: Sequence[NicSpec]) -> None:
        """One round by the uplink; the macvtaps are up when it returns."""
        await self._silence(domain)
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
        """The macvtaps stay: their hypervisors hold them."""
        await super().close()
        self._closings.close()
        moving.give_up_claims([each for every in self._departures.values() for each in every])
        if self._removals:
            await asyncio.wait(self._removals)

    # --- a domain that moves ---

    def announce_now(self, domain: DomainName) -> float | None:
        at_s: float | None = None
        if self._socket is not None:
            for arrival in self._arrivals.get(domain, ()):
                if announcing.send(self._socket, [self._exit], arrival.frames):
                    at_s = at_s or time.time()
        return at_s

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

    # --- what the kernel is told ---

    def _leave(
        self, domain: DomainName, nics: Sequence[NicSpec], tunnel: Tunnel
    ) -> tuple[tuple[MacvtapDeparture, ...], list[str]]:
        return moving.prepare_departure(self.network, domain, nics, tunnel)

    def _divert(self, departures: Sequence[MacvtapDeparture]) -> None:
        moving.divert(self.network, departures)

    def _shut(self, departures: Sequence[MacvtapDeparture]) -> None:
        moving.shut(departures)

    def _reopen(self, domain: DomainName, nics: Sequence[NicSpec]) -> None:
        moving.reopen(domain, nics)

    def _come(
        self, domain: DomainName, nics: Sequence[NicSpec], tunnel: Tunnel
    ) -> tuple[tuple[MacvtapArrival, ...], list[str]]:
        return moving.prepare_arrival(self.network, domain, nics, tunnel)

    def _open(self, arrivals: Sequence[MacvtapArrival]) -> None:
        moving.open_arrival(arrivals)

    def _close(self, ends: Sequence[Departure | Arrival]) -> tuple[int, int]:
        return moving.close_ends(ends)

    def _remove(self, tap: str) -> None:
        network.unplug(tap)

    # --- inside ---

    async def _watch(self, tap: str, nic: NicSpec) -> None:
        await super()._watch(tap, nic)
        try:
            found = await in_thread(lambda: network.node_of(tap))
            if found is not None:
                index, node = found
                self._closings.watch((tap, index), node)
        except FabricError as error:
            log.warning("the end of macvtap %s isn't watched: %s", tap, error)

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


def _sweep() -> None:
    network.sweep()
    sweep_rules({link.name for link in network.macvtaps()})


def _raise(domain: DomainName, nics: Sequence[NicSpec]) -> list[NicSpec]:
    """The NICs that have a macvtap here; it is up."""
    found: list[NicSpec] = []
    for index, nic in enumerate(nics):
        tap_index = index_of(tap_name(domain, index))
        if tap_index is not None:
            set_up(tap_index, up=True)
            found.append(nic)
    return found
