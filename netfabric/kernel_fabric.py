"""What the kernel's fabrics have in common: a domain's move, its addresses, its first frames.

    FabricDriver (the port) ── KernelFabric ─┬─ BridgeFabric ── VxlanFabric
                                             ├─ RoutedFabric
                                             └─ MacvtapFabric

A driver says what its kernel is told in each step of a move (`_leave` to `_close`); which step
knows of which NICs, what is undone where nobody waits any more, and what a failure leaves, is here.

What begins a move and what ends one take turns, domain by domain: the ends of a domain's tunnels
have the same names in each of its moves, so what an earlier move still had to close late would be
the later one's. A guest that comes back after its grace time, just as that ends, waits for it.

A NIC that can't be forwarded for departs and arrives all the same: its failure is raised after all
else is done. Belongs to one event loop. Errors: FabricError.
"""

from __future__ import annotations

import abc
import asyncio
import logging
import socket
import weakref
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Generic

from migrator.errors import FabricError
from migrator.model import DomainName, NicSpec
from migrator.ports import FabricDriver, FirstFrames, Tunnel, TunnelReport
from netfabric.addresses import AddressWatcher
from netfabric.announcer import Announcer
from netfabric.first_frames import FirstFrameWatches
from netfabric.frames import parse_mac
from netfabric.moves import Arrival, Coming, Departure, Leaving, with_addresses
from netfabric.taps import tap_name, tunnel_name
from netfabric.threads import in_thread
from netfabric.tunnel_tests import TunnelTests

log = logging.getLogger(__name__)


class KernelFabric(FabricDriver, Generic[Leaving, Coming]):
    """See the module."""

    def __init__(self, gaps_s: Sequence[float], *, outgoing_to_guest: bool = True) -> None:
        """`gaps_s`: between the rounds of an announcement, seconds.

        `outgoing_to_guest`: what leaves by a NIC's interface goes to the guest: a tap's does.
        """
        self._announcer = Announcer(gaps_s)
        self._addresses = AddressWatcher(outgoing_to_guest=outgoing_to_guest)
        self._first = FirstFrameWatches(outgoing_to_guest=outgoing_to_guest)
        self._departures: dict[DomainName, tuple[Leaving, ...]] = {}
        self._arrivals: dict[DomainName, tuple[Coming, ...]] = {}
        self._tests = TunnelTests()
        self._turns: weakref.WeakValueDictionary[DomainName, asyncio.Lock] = (
            weakref.WeakValueDictionary()
        )
        self._socket: socket.socket | None = None

    # --- what the kernel is told; synchronous, in threads ---

    @abc.abstractmethod
    def _leave(
        self, domain: DomainName, nics: Sequence[NicSpec], tunnel: Tunnel
    ) -> tuple[tuple[Leaving, ...], list[str]]:
        """Make the tunnels' ends. The NICs, and why some can't be forwarded for."""

    @abc.abstractmethod
    def _divert(self, departures: Sequence[Leaving]) -> None: ...

    @abc.abstractmethod
    def _shut(self, departures: Sequence[Leaving]) -> None: ...

    @abc.abstractmethod
    def _reopen(self, domain: DomainName, nics: Sequence[NicSpec]) -> None:
        """By names alone, so that a restarted agent can do it."""

    @abc.abstractmethod
    def _come(
        self, domain: DomainName, nics: Sequence[NicSpec], tunnel: Tunnel
    ) -> tuple[tuple[Coming, ...], list[str]]:
        """Make the tunnels' ends. The NICs, and why some can't be forwarded to."""

    @abc.abstractmethod
    def _open(self, arrivals: Sequence[Coming]) -> None: ...

    @abc.abstractmethod
    def _close(self, ends: Sequence[Departure | Arrival]) -> tuple[int, int]:
        """Remove the tunnels' ends; frames that came out of them, and that went in."""

    @abc.abstractmethod
    def _remove(self, tap: str) -> None:
        """A NIC's interface and its rules. Idempotent."""

    async def _be_ready(self, nics: Sequence[NicSpec]) -> None:
        """The NICs are about to come: what the moment of the resume needs. FabricError."""
        self._packet_socket()

    # --- a domain that stays ---

    async def unplug(self, domain: DomainName, index: int) -> None:
        """Remove the tap, also from under a hypervisor that holds it. Ends announcements.

        A tunnel that still leads from this node to the domain's new one stays, for its time.
        """
        tap = tap_name(domain, index)
        await self._silence(domain)
        await self._addresses.forget(tap)
        await self._first.discard(domain)
        await self._tests.deafen(domain)
        async with self._turn(domain):
            arrivals = self._arrivals.pop(domain, ())
            await in_thread(lambda: self._remove(tap))
            await in_thread(lambda: self._close(arrivals))

    async def close(self) -> None:
        """End the announcements. Taps stay. Idempotent; the driver can be used again."""
        await self._announcer.close()
        await self._addresses.close()
        await self._first.close()
        await self._tests.close()
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    async def watch(self, domain: DomainName, nics: Sequence[NicSpec]) -> None:
        for index, nic in enumerate(nics):
            await self._watch(tap_name(domain, index), nic)

    def learnt(self, domain: DomainName, nics: Sequence[NicSpec]) -> Sequence[tuple[str, ...]]:
        return [self._addresses.learnt(tap_name(domain, index)) for index, _ in enumerate(nics)]

    def addresses_here(self) -> frozenset[str]:
        return self._addresses.known()

    # --- a domain that moves ---

    async def prepare_departure(
        self, domain: DomainName, nics: Sequence[NicSpec], tunnel: Tunnel
    ) -> None:
        """FabricError: some NIC can't be forwarded for. It departs all the same."""
        async with self._turn(domain):
            earlier = self._arrivals.pop(domain, ())
            await in_thread(lambda: self._close(earlier))
            departures, failures = await in_thread(
                lambda: self._leave(domain, nics, tunnel), lambda made: self._discard(made[0])
            )
            self._departures[domain] = departures
            await self._tests.deafen(domain)
            self._tests.forget_sent(domain)
        if failures:
            raise FabricError("; ".join(failures))

    async def send_through(self, domain: DomainName, nics: Sequence[NicSpec]) -> Sequence[bool]:
        ends = {each.tunnel for each in self._departures.get(domain, ())}
        names = [tunnel_name(domain, index) for index in range(len(nics))]
        widths = [
            nic.mtu_bytes if name in ends else None for name, nic in zip(names, nics, strict=True)
        ]
        return await self._tests.send(domain, names, widths)

    async def divert(self, domain: DomainName, without: Collection[int] = ()) -> None:
        names = {tunnel_name(domain, index) for index in without}
        departures = tuple(
            replace(each, forwards=False) if each.tunnel in names else each
            for each in self._departures.get(domain, ())
        )
        await in_thread(lambda: self._divert(departures))

    async def shut(self, domain: DomainName) -> None:
        departures = self._departures.get(domain, ())
        await in_thread(lambda: self._shut(departures))

    async def reopen(self, domain: DomainName, nics: Sequence[NicSpec]) -> None:
        async with self._turn(domain):
            departures = self._departures.pop(domain, ())
            self._tests.forget_sent(domain)
            await in_thread(lambda: self._reopen(domain, nics))
            await in_thread(lambda: self._close(departures))

    async def end_departure(self, domain: DomainName) -> int:
        async with self._turn(domain):
            return await self._forwarded(domain, self._departures.pop(domain, ()))

    async def prepare_arrival(
        self, domain: DomainName, nics: Sequence[NicSpec], tunnel: Tunnel
    ) -> None:
        """FabricError: some NIC can't be forwarded to. It arrives all the same."""
        async with self._turn(domain):
            earlier = self._departures.pop(domain, ())
            await in_thread(lambda: self._close(earlier))
            arrivals, failures = await in_thread(
                lambda: self._come(domain, nics, tunnel), lambda made: self._discard(made[0])
            )
            self._arrivals[domain] = arrivals
            await self._tests.listen(domain, [arrival.tunnel for arrival in arrivals])
        try:
            await self._be_ready(nics)
        except FabricError as error:
            failures.append(str(error))
        if failures:
            raise FabricError("; ".join(failures))

    async def heard_through(
        self, domain: DomainName, nics: Sequence[NicSpec]
    ) -> Sequence[TunnelReport]:
        return [
            self._tests.heard(domain, tunnel_name(domain, index), nic.mtu_bytes)
            for index, nic in enumerate(nics)
        ]

    async def open_arrival(self, domain: DomainName, learnt: Sequence[Sequence[str]] = ()) -> None:
        arrivals = with_addresses(self._arrivals.get(domain, ()), learnt)
        if arrivals:
            self._arrivals[domain] = arrivals
        for arrival in arrivals:
            self._addresses.add(arrival.tap, arrival.learnt)
        await in_thread(lambda: self._open(arrivals))
        await self._first.open(domain, [arrival.tap for arrival in arrivals])

    async def end_arrival(self, domain: DomainName) -> int:
        async with self._turn(domain):
            arrivals = self._arrivals.pop(domain, ())
            await self._first.discard(domain)
            tests = await self._tests.deafen(domain)
            return max((await in_thread(lambda: self._close(arrivals)))[0] - tests, 0)

    async def first_frames(
        self, domain: DomainName, since_s: float, timeout_s: float
    ) -> FirstFrames:
        taps = [arrival.tap for arrival in self._arrivals.get(domain, ())]
        return await self._first.wait(domain, taps, since_s, timeout_s)

    # --- inside ---

    def _turn(self, domain: DomainName) -> asyncio.Lock:
        """Whoever makes or closes the ends of the domain's tunnels has it; not reentrant."""
        return self._turns.setdefault(domain, asyncio.Lock())

    async def _forwarded(self, domain: DomainName, departures: Sequence[Leaving]) -> int:
        """Closes the tunnels' ends; frames that went in, but for those that tried them."""
        tests = self._tests.forget_sent(domain)
        return max((await in_thread(lambda: self._close(departures)))[1] - tests, 0)

    async def _silence(self, domain: DomainName) -> None:
        await self._announcer.silence(domain)

    async def _watch(self, tap: str, nic: NicSpec) -> None:
        """Nothing depends on it: a watch that fails is logged."""
        try:
            self._addresses.watch(tap, parse_mac(nic.mac), nic.addresses)
        except FabricError as error:
            log.warning("addresses of NIC %s aren't learnt: %s", nic.mac, error)

    def _discard(self, ends: Sequence[Departure | Arrival]) -> None:
        """Of a move that nobody waits for any more."""
        self._close(ends)

    def _packet_socket(self) -> socket.socket:
        """One socket for all ports. Protocol 0: it receives nothing."""
        if self._socket is None:
            try:
                self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
            except OSError as error:
                raise FabricError(f"can't open a packet socket: {error.strerror}") from error
            self._socket.setblocking(False)
        return self._socket
