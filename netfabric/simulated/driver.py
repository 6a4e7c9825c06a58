"""A network in memory that learns where MACs are, as a switch does, and forgets nothing.

    node a: SimulatedFabric ─┐
                             ├─ SimulatedNetwork: where each MAC was last announced, every frame
    node b: SimulatedFabric ─┘

The frames are the real ones. What the hypervisor gets for a tap is a real descriptor (of an
event counter, which carries no frames), so that leaks of descriptors show here too.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Final

from migrator.errors import FabricError
from migrator.model import DomainName, NicSpec, NodeName
from migrator.ports import (
    FabricDriver,
    FirstFrames,
    ProbeReport,
    Tunnel,
    TunnelReport,
    WidthReport,
)
from netfabric.announcer import GAPS_S, Announcer
from netfabric.checks import mtu_reason, nic_reasons
from netfabric.frames import announcements

NICS_MAX: Final = 100
SHORT_BYTES: Final = 64


@dataclass(frozen=True, slots=True)
class Announcement:
    """One frame that reached the network. `lost`: it was sent, but nobody heard it."""

    node: NodeName
    domain: DomainName
    mac: str
    frame: bytes
    lost: bool


@dataclass(slots=True)
class SimulatedNetwork:
    """What all nodes share. `bridges` maps each bridge's name to its MTU in bytes."""

    bridges: Mapping[str, int] = field(default_factory=lambda: {"br0": 1500})
    where: dict[str, NodeName] = field(default_factory=dict)
    """The node that each MAC was last heard from."""
    announcements: list[Announcement] = field(default_factory=list)
    tokens: set[bytes] = field(default_factory=set)
    width_bytes: int = 65_535
    """The longest frame's payload that passes between two nodes."""
    tunnel_width_bytes: int = 65_535
    """The longest that passes the tunnels between two nodes; 0: a firewall drops all of it."""
    tried: dict[str, frozenset[int]] = field(default_factory=dict)
    """The lengths of the test frames that came through the tunnels, by the tunnel's name."""


@dataclass(slots=True)
class FabricFaults:
    """What goes wrong on one node, until set back."""

    plug_fails: bool = False
    announce_fails: bool = False
    """No frame can be sent: FabricError."""
    tunnel_fails: bool = False
    """This node can't make its ends of tunnels: FabricError."""
    frames_lost: int = 0
    """So many of the next frames are sent and lost on the way."""


class SimulatedFabric(FabricDriver):
    """One node's end of a SimulatedNetwork. Errors: FabricError."""

    name: ClassVar[str] = "simulated"

    def __init__(
        self,
        node: NodeName | None = None,
        network: SimulatedNetwork | None = None,
        faults: FabricFaults | None = None,
        *,
        gaps_s: Sequence[float] = GAPS_S,
    ) -> None:
        self.node = node or NodeName("node")
        self.network = network or SimulatedNetwork()
        self.faults = faults or FabricFaults()
        self._announcer = Announcer(gaps_s)
        self._plugged: dict[tuple[DomainName, int], NicSpec] = {}
        self.closed: set[DomainName] = set()
        """Domains whose ports take or give nothing: on their way here, or away."""
        self.diverted: set[DomainName] = set()
        """Domains whose frames take the tunnel away from here."""
        self.learns: dict[str, tuple[str, ...]] = {}
        """What the guests behind these MACs were seen to use."""
        self._arriving: dict[DomainName, tuple[NicSpec, ...]] = {}
        self._tunnels: dict[DomainName, str] = {}
        """Of the domains that leave or come."""

    @property
    def plugged(self) -> frozenset[tuple[DomainName, int]]:
        """The NICs that were plugged and not unplugged. The simulation ends those of the dead."""
        return frozenset(self._plugged)

    async def open(self) -> None:
        self.diverted.clear()

    async def check(self, nic: NicSpec) -> Sequence[str]:
        return self._reasons(nic)

    async def plug(self, domain: DomainName, index: int, nic: NicSpec) -> int:
        if not 0 <= index < NICS_MAX:
            raise FabricError(f"NIC {index} of domain {domain}: there is no such index")
        reasons = self._reasons(nic)
        if reasons:
            raise FabricError("; ".join(reasons))
        if self.faults.plug_fails:
            raise FabricError(f"simulated: NIC {index} of domain {domain} can't be plugged")
        fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._plugged[domain, index] = nic
        return fd

    async def unplug(self, domain: DomainName, index: int) -> None:
        await self._announcer.silence(domain)
        self._plugged.pop((domain, index), None)

    async def announce(self, domain: DomainName, nics: Sequence[NicSpec]) -> None:
        await self._announcer.silence(domain)
        missing = [
            nic.mac for index, nic in enumerate(nics) if (domain, index) not in self._plugged
        ]
        present = [nic for index, nic in enumerate(nics) if (domain, index) in self._plugged]

        async def send() -> None:
            self._send(domain, present)

        failure: FabricError | None = None
        try:
            await send()
        except FabricError as error:
            failure = error
        if present:
            await self._announcer.repeat(domain, send)
        if failure is not None:
            raise failure
        if missing:
            raise FabricError(f"domain {domain}: no tap here for NICs {', '.join(missing)}")

    async def close(self) -> None:
        await self._announcer.close()

    # --- a domain that moves ---

    async def prepare_departure(
        self, domain: DomainName, nics: Sequence[NicSpec], tunnel: Tunnel
    ) -> None:
        self.diverted.discard(domain)
        self._make_tunnel(domain, tunnel)

    async def send_through(self, domain: DomainName, nics: Sequence[NicSpec]) -> Sequence[bool]:
        name, widest = self._tunnels.get(domain), self.network.tunnel_width_bytes
        if name is None:
            return [False for _ in nics]
        lengths = {length for nic in nics for length in (SHORT_BYTES, nic.mtu_bytes)}
        self.network.tried[name] = frozenset(each for each in lengths if each <= widest)
        return [True for _ in nics]

    async def divert(self, domain: DomainName, without: Collection[int] = ()) -> None:
        if not without:
            self.diverted.add(domain)

    async def shut(self, domain: DomainName) -> None:
        self.closed.add(domain)

    async def reopen(self, domain: DomainName, nics: Sequence[NicSpec]) -> None:
        self.closed.discard(domain)
        self.diverted.discard(domain)
        self._tunnels.pop(domain, None)

    async def end_departure(self, domain: DomainName) -> int:
        self.closed.discard(domain)
        self.diverted.discard(domain)
        self._tunnels.pop(domain, None)
        return 0

    async def prepare_arrival(
        self, domain: DomainName, nics: Sequence[NicSpec], tunnel: Tunnel
    ) -> None:
        self.closed.add(domain)
        self._arriving[domain] = tuple(nics)
        self._make_tunnel(domain, tunnel)

    async def heard_through(
        self, domain: DomainName, nics: Sequence[NicSpec]
    ) -> Sequence[TunnelReport]:
        name = self._tunnels.get(domain)
        if name is None or domain not in self._arriving:
            return [TunnelReport(made=False) for _ in nics]
        lengths = self.network.tried.get(name, frozenset())
        return [
            TunnelReport(short=SHORT_BYTES in lengths, full=nic.mtu_bytes in lengths)
            for nic in nics
        ]

    async def watch(self, domain: DomainName, nics: Sequence[NicSpec]) -> None:
        pass

    def learnt(self, domain: DomainName, nics: Sequence[NicSpec]) -> Sequence[tuple[str, ...]]:
        return [self.learns.get(nic.mac, ()) for nic in nics]

    def addresses_here(self) -> frozenset[str]:
        return frozenset(text for nic in self._plugged.values() for text in nic.addresses)

    async def open_arrival(self, domain: DomainName, learnt: Sequence[Sequence[str]] = ()) -> None:
        self.closed.discard(domain)

    def announce_now(self, domain: DomainName) -> float | None:
        try:
            self._send(domain, self._arriving.get(domain, ()))
        except FabricError:
            return None
        return time.time() if domain in self._arriving else None

    async def end_arrival(self, domain: DomainName) -> int:
        self._arriving.pop(domain, None)
        self._tunnels.pop(domain, None)
        return 0

    async def first_frames(
        self, domain: DomainName, since_s: float, timeout_s: float
    ) -> FirstFrames:
        return FirstFrames()

    async def send_wide(self, nic: NicSpec, token: bytes) -> None:
        self.network.tokens.add(token)

    async def hear_wide(self, nic: NicSpec, token: bytes, timeout_s: float) -> WidthReport:
        await asyncio.sleep(0)  # The other node's turn: it has sent by now, or sends in vain.
        short = token in self.network.tokens
        return WidthReport(short=short, full=short and nic.mtu_bytes <= self.network.width_bytes)

    async def probe(self, nic: NicSpec, timeout_s: float) -> ProbeReport:
        where = self.network.where.get(nic.mac)
        if nic.bridge not in self.network.bridges:
            return ProbeReport(able=False, detail=f"there is no bridge {nic.bridge} here")
        if where is None or where == self.node:
            return ProbeReport(able=True)
        return ProbeReport(able=True, answered=nic.addresses, heard=("arp",), learnt_at="uplink")

    def forget(self, domain: DomainName) -> None:
        """The domain's hypervisor died, so its taps are gone (as the kernel does it)."""
        for key in [key for key in self._plugged if key[0] == domain]:
            del self._plugged[key]

    def _reasons(self, nic: NicSpec) -> list[str]:
        reasons = nic_reasons(nic)
        mtu_bytes = self.network.bridges.get(nic.bridge)
        if mtu_bytes is None:
            return [*reasons, f"there is no bridge {nic.bridge} here"]
        narrow = mtu_reason(nic, mtu_bytes)
        return [*reasons, narrow] if narrow else reasons

    def _make_tunnel(self, domain: DomainName, tunnel: Tunnel) -> None:
        self._tunnels.pop(domain, None)
        if self.faults.tunnel_fails:
            raise FabricError(f"simulated: no tunnel to {tunnel.remote}")
        self._tunnels[domain] = tunnel.name

    def _send(self, domain: DomainName, nics: Sequence[NicSpec]) -> None:
        for nic in nics:
            for frame in announcements(nic):
                if self.faults.announce_fails:
                    raise FabricError("simulated: no frame can be sent")
                lost = self.faults.frames_lost > 0
                self.faults.frames_lost -= lost
                if not lost:
                    self.network.where[nic.mac] = self.node
                self.network.announcements.append(
                    Announcement(self.node, domain, nic.mac, frame, lost)
                )
