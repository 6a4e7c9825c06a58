"""Guests without any layer 2: each address is a host route to its guest's tap.

                     this node                                routers
    guest ── tap ── routing table ── uplink ──────────────── host routes ── everybody else
             │      10.0.0.5/32 dev TAP                      10.0.0.5/32 via this node
             └ answers every ARP question itself; fe80::1

The node's own table says where the guest is here (`plugging`), the routers' follow by a route
driver (`netfabric.routes`), which stands where the announcements of a bridge stand: said once in
the moment of the resume, and again until it is verified.

    metric 1      the guest is here, or has left and what still comes takes the tunnel
    metric 1024   where another node has said that the address is
    metric 2048   plugged here, and nobody else has it

Two guests of one node, and two nodes, reach each other through routing tables alone. Needs
CAP_NET_ADMIN and CAP_NET_RAW. Belongs to one event loop.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
from collections.abc import Sequence
from typing import ClassVar, Final

from migrator.errors import FabricError
from migrator.model import DomainName, NicSpec
from migrator.ports import ProbeReport, RouteDriver, Tunnel, WidthReport
from netfabric.announcer import GAPS_S
from netfabric.bridge import tunnels
from netfabric.bridge.links import index_of
from netfabric.bridge.plugging import sweep, unplug
from netfabric.host_routes import Address
from netfabric.kernel_fabric import KernelFabric
from netfabric.moves import Arrival, Departure
from netfabric.routed import moving, overlay_probing, plugging, probing
from netfabric.routed.moving import RoutedDeparture
from netfabric.routed.network import RoutedNetwork, prepare_node, reasons
from netfabric.taps import tap_name
from netfabric.threads import in_thread

FIRST_ROUND_S: Final = 0.5
"""An announcement waits so long for the routers' answers; it goes on without."""
HOLD_S: Final = 10.0
"""What still arrives at the old node is forwarded so much longer, if no new route is seen."""
_LOOK_S: Final = 0.25

log = logging.getLogger(__name__)


class RoutedFabric(KernelFabric[RoutedDeparture, Arrival]):
    """See the module. Errors: FabricError."""

    name: ClassVar[str] = "routed"

    def __init__(
        self, network: RoutedNetwork, routes: RouteDriver, *, gaps_s: Sequence[float] = GAPS_S
    ) -> None:
        """`gaps_s`: between the rounds of an announcement, seconds."""
        super().__init__(gaps_s)
        self.network = network
        self.routes = routes
        self._plugged: dict[DomainName, dict[int, NicSpec]] = {}
        self._withdrawn: dict[DomainName, Sequence[RoutedDeparture]] = {}
        """The departures whose addresses this node says nothing of any more."""

    async def open(self) -> None:
        """Also lets this node forward, and starts the route driver."""
        await in_thread(tunnels.remove_leftovers)
        await in_thread(sweep)
        await in_thread(lambda: prepare_node(self.network))
        await self.routes.open()

    async def check(self, nic: NicSpec) -> Sequence[str]:
        return await in_thread(lambda: reasons(self.network, nic))

    async def plug(self, domain: DomainName, index: int, nic: NicSpec) -> int:
        """The NIC's tap, to which its addresses lead if nobody else has them."""
        tap = tap_name(domain, index)
        fd = await in_thread(lambda: plugging.plug(self.network, tap, nic), plugging.close)
        self._plugged.setdefault(domain, {})[index] = nic
        await self._watch(tap, nic)
        return fd

    async def unplug(self, domain: DomainName, index: int) -> None:
        """Also withdraws the NIC's addresses; of a guest that has moved, once that is seen."""
        nic = self._plugged.get(domain, {}).pop(index, None)
        if not self._plugged.get(domain):
            self._plugged.pop(domain, None)
        await super().unplug(domain, index)
        departures = self._departures.get(domain)
        if departures is not None:  # Looked for in an announcement's gaps; then `end_departure`.
            await self._announcer.repeat(domain, lambda: self._withdraw_seen(domain, departures))
        elif nic is not None:
            self._withdrawn.pop(domain, None)
            await self.routes.withdraw(nic.addresses)

    async def announce(self, domain: DomainName, nics: Sequence[NicSpec]) -> None:
        """The addresses lead to the taps here, and the routers here. Bounded by FIRST_ROUND_S.

        Said again with growing gaps. FabricError: a NIC has no tap here, or a router doesn't
        answer. The other NICs are announced nevertheless, and all of it is repeated.
        """
        await self._silence(domain)
        if not nics:
            return
        nics = self._defined(domain, nics)
        led, missing = await in_thread(lambda: _lead(self.network, domain, nics))
        addresses = [text for nic in led for text in nic.addresses]
        failures = [f"NIC {nic.mac} has no tap here" for nic in missing]

        async def repeat() -> None:
            await self.routes.lead_here(addresses)

        try:
            async with asyncio.timeout(FIRST_ROUND_S):
                await self.routes.lead_here(addresses)
        except FabricError as error:
            failures.append(str(error))
        except TimeoutError:
            failures.append(f"not every router has answered within {FIRST_ROUND_S:g} s")
        if addresses:
            await self._announcer.repeat(domain, repeat)
        if failures:
            raise FabricError("; ".join(failures))

    async def close(self) -> None:
        """Taps and routes stay: the guests go on."""
        await super().close()
        await self.routes.close()

    # --- a domain that moves ---

    async def end_departure(self, domain: DomainName) -> int:
        """Forwards on for up to HOLD_S, until a newer route is seen from here."""
        departures = self._departures.get(domain, ())
        addresses = _addresses(departures)
        if not addresses:
            return 0
        seen = await self._seen_elsewhere(domain, departures, addresses)
        async with self._turn(domain):  # What comes back prepares its routes after this.
            if self._departures.get(domain) is not departures:
                return 0  # It has come back meanwhile, and that has closed the tunnel.
            if not seen:
                log.warning("domain %s: no route elsewhere was seen for %s", domain, addresses)
            del self._departures[domain]
            if self._withdrawn.pop(domain, None) is not departures:
                await self.routes.withdraw(addresses)
            return await self._forwarded(domain, departures)

    def announce_now(self, domain: DomainName) -> float | None:
        arrivals = self._arrivals.get(domain, ())
        addresses = [text for arrival in arrivals for text in arrival.nic.addresses]
        return self.routes.lead_here_now(addresses) if addresses else None

    async def probe(self, nic: NicSpec, timeout_s: float) -> ProbeReport:
        hops: dict[Address, str] = {}
        if self.network.overlay is not None:
            for text in nic.addresses:
                hop = await self.routes.hop_of(text)
                if hop is not None:
                    hops[ipaddress.ip_address(text)] = hop
        return await in_thread(lambda: probing.probe(self.network, nic, timeout_s, hops))

    async def send_wide(self, nic: NicSpec, token: bytes) -> None:
        """No frame reaches another node. See `measure_width`."""

    async def hear_wide(self, nic: NicSpec, token: bytes, timeout_s: float) -> WidthReport:
        cut_off = await self.routes.cut_off(nic.addresses)
        if not cut_off and self.network.overlay is not None:
            bridge = self.network.overlay.bridge
            known = await in_thread(lambda: overlay_probing.ends(bridge))
            if known and not any(known.values()):
                cut_off = f"FRR has entered no router MAC into {bridge}, though routes lead there"
        return WidthReport(hops=self.network.local, cut_off=cut_off)

    async def measure_width(
        self, nic: NicSpec, hops: Sequence[str], timeout_s: float
    ) -> WidthReport:
        """By ICMP echo, unfragmented, in each IP version that the NIC has."""
        return await in_thread(lambda: probing.width(self.network, nic, hops, timeout_s))

    async def watch(self, domain: DomainName, nics: Sequence[NicSpec]) -> None:
        self._plugged[domain] = dict(enumerate(nics))
        await super().watch(domain, nics)
        for nic in nics:
            self.routes.hold(nic.addresses)

    # --- what the kernel is told ---

    def _leave(
        self, domain: DomainName, nics: Sequence[NicSpec], tunnel: Tunnel
    ) -> tuple[tuple[RoutedDeparture, ...], list[str]]:
        return moving.prepare_departure(domain, nics, tunnel)

    def _divert(self, departures: Sequence[RoutedDeparture]) -> None:
        moving.divert(self.network, departures)

    def _shut(self, departures: Sequence[RoutedDeparture]) -> None:
        moving.shut(departures)

    def _reopen(self, domain: DomainName, nics: Sequence[NicSpec]) -> None:
        moving.reopen(self.network, domain, nics)

    def _come(
        self, domain: DomainName, nics: Sequence[NicSpec], tunnel: Tunnel
    ) -> tuple[tuple[Arrival, ...], list[str]]:
        return moving.prepare_arrival(domain, nics, tunnel)

    async def _be_ready(self, nics: Sequence[NicSpec]) -> None:
        try:
            await self.routes.prepare([text for nic in nics for text in nic.addresses])
        except FabricError as error:
            raise FabricError(f"the routers aren't prepared: {error}") from error

    def _open(self, arrivals: Sequence[Arrival]) -> None:
        moving.open_arrival(self.network, arrivals)

    def _close(self, ends: Sequence[Departure | Arrival]) -> tuple[int, int]:
        """And the routes into them."""
        return tunnels.close_ends(ends)

    def _remove(self, tap: str) -> None:
        unplug(tap)

    # --- inside ---

    def _defined(self, domain: DomainName, nics: Sequence[NicSpec]) -> list[NicSpec]:
        """Without what was learnt: a guest that says an address doesn't get its route."""
        known = self._plugged.get(domain, {})
        return [known.get(index, nic) for index, nic in enumerate(nics)]

    async def _withdraw_seen(
        self, domain: DomainName, departures: Sequence[RoutedDeparture]
    ) -> None:
        """As soon as the newer route is seen. Ours would count again when that one goes: for a
        guest that ends, or whose node fails, just after its move.
        """
        over = self._departures.get(domain) is not departures
        addresses = _addresses(departures)
        if over or self._withdrawn.get(domain) is departures or not addresses:
            return
        if not await self.routes.leads_away(addresses):
            return
        async with self._turn(domain):  # As in `end_departure`: it may come back.
            if self._departures.get(domain) is departures:
                await self.routes.withdraw(addresses)
                self._withdrawn[domain] = departures

    async def _seen_elsewhere(
        self,
        domain: DomainName,
        departures: Sequence[RoutedDeparture],
        addresses: Sequence[str],
    ) -> bool:
        """False: not within HOLD_S, or this departure is over."""
        loop = asyncio.get_running_loop()
        until = loop.time() + HOLD_S
        while self._withdrawn.get(domain) is not departures and not await self.routes.leads_away(
            addresses
        ):
            if loop.time() > until or self._departures.get(domain) is not departures:
                return False
            await asyncio.sleep(_LOOK_S)
        return True


def _addresses(departures: Sequence[RoutedDeparture]) -> list[str]:
    return [text for each in departures for text in each.nic.addresses]


def _lead(
    network: RoutedNetwork, domain: DomainName, nics: Sequence[NicSpec]
) -> tuple[list[NicSpec], list[NicSpec]]:
    """Those whose addresses lead to their taps now, and those that have none here."""
    led: list[NicSpec] = []
    missing: list[NicSpec] = []
    for index, nic in enumerate(nics):
        tap_index = index_of(tap_name(domain, index))
        if tap_index is None:
            missing.append(nic)
            continue
        plugging.lead(network, tap_index, nic)
        led.append(nic)
    return led, missing
