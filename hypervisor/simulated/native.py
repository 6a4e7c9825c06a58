"""The simulated hypervisor's own migration: scripted passes, memory that arrives at once.

`SimulatedHost.native_pending` holds the pages that are dirty again at the end of each pass; when
it is empty, a pass leaves none and the migration stops at its switchover by itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

from hypervisor.simulated.host import SimulatedGuest, SimulatedHost
from migrator.errors import HypervisorError, NotFoundError
from migrator.model import PAGE_SIZE_BYTES, DomainName, DomainState
from migrator.native_port import NativeFigures, NativeMigration, NativeSettings
from migrator.ports import DomainEventKind

PASS_S = 0.005
"""How long a pass takes."""
BROKEN = "simulated: nobody reads any more"
"""Why one fails whose destination is gone."""


class NativeRun:
    """One migration under way at a source."""

    def __init__(self, channel: Path) -> None:
        self.channel = channel
        self.passes = 0
        self.bytes_sent = 0
        self.pending_pages = 0
        self.error = ""
        self.switch_over = asyncio.Event()
        self.task: asyncio.Task[None] | None = None


class SimulatedNative(NativeMigration):
    """See the module. Addresses are made up: a port is a number of `SimulatedChannels`."""

    def __init__(self, host: SimulatedHost, receive: Callable[[DomainName, Path], None]) -> None:
        """`receive`: wait for the device state, at that channel."""
        self._host = host
        self._receive = receive
        self._runs: dict[str, NativeRun] = {}
        self._prepared: dict[str, NativeSettings] = {}

    def _guest(self, domain: DomainName) -> SimulatedGuest:
        guest = self._host.guests.get(domain)
        if guest is None:
            raise NotFoundError(f"domain {domain} has no process here")
        return guest

    async def receive(self, domain: DomainName, settings: NativeSettings) -> tuple[str, int]:
        guest = self._guest(domain)
        await self._host.faults.strike("native_receive")
        if guest.state is not DomainState.INCOMING or guest.loaded:
            raise HypervisorError(f"{domain}: can't receive: its state is {guest.state}")
        self._receive(domain, _channel(guest.pid))
        return settings.bind_address, guest.pid

    async def prepare(self, domain: DomainName, settings: NativeSettings) -> None:
        self._guest(domain)
        await self._host.faults.strike("native_prepare")
        self._prepared[domain] = settings

    async def begin(self, domain: DomainName, host: str, port: int) -> None:
        guest = self._guest(domain)
        await self._host.faults.strike("native_begin")
        if domain not in self._prepared:
            raise HypervisorError(f"{domain}: its migration was not prepared")
        if guest.state not in (DomainState.RUNNING, DomainState.PAUSED):
            raise HypervisorError(f"{domain}: can't be migrated: its state is {guest.state}")
        run = self._runs[domain] = NativeRun(_channel(port))
        guest.state_before_switchover = guest.state
        guest.device_channel = run.channel
        if not self._host.channels.reaches(run.channel):
            self._fail(domain, guest, run)
            return
        run.task = asyncio.create_task(self._iterate(domain, guest, run))

    async def _iterate(self, domain: DomainName, guest: SimulatedGuest, run: NativeRun) -> None:
        """Pass after pass, until told to switch over, or nothing is left."""
        run.passes = 1
        run.pending_pages = guest.memory_in_use_bytes // PAGE_SIZE_BYTES
        self._host.emit(domain, DomainEventKind.PASS_BEGAN, "1")
        while not run.switch_over.is_set() or run.passes == 1:
            await asyncio.sleep(PASS_S)
            if guest.device_channel != run.channel or self._host.guests.get(domain) is not guest:
                return  # Given up, or gone.
            if not self._host.channels.reaches(run.channel):
                self._fail(domain, guest, run)
                return
            run.bytes_sent += run.pending_pages * PAGE_SIZE_BYTES
            pending = self._host.native_pending
            run.pending_pages = pending.popleft() if pending else 0
            run.passes += 1
            self._host.emit(domain, DomainEventKind.PASS_BEGAN, str(run.passes))
            if not run.pending_pages:
                break
        guest.halt(DomainState.PRE_SWITCHOVER, self._host.clock())
        self._host.emit(domain, DomainEventKind.PAUSED)
        self._host.emit(domain, DomainEventKind.PRE_SWITCHOVER)

    def _fail(self, domain: DomainName, guest: SimulatedGuest, run: NativeRun) -> None:
        guest.device_channel = None
        run.error = BROKEN
        self._host.emit(domain, DomainEventKind.MIGRATION_FAILED, "failed")

    async def switch_over(self, domain: DomainName) -> None:
        self._guest(domain)
        await self._host.faults.strike("native_switch_over")
        if domain in self._runs:
            self._runs[domain].switch_over.set()

    async def limit_bandwidth(self, domain: DomainName, bandwidth_bytes_per_s: int | None) -> None:
        self._guest(domain)
        await self._host.faults.strike("native_limit_bandwidth")

    async def figures(self, domain: DomainName) -> NativeFigures:
        self._guest(domain)
        await self._host.faults.strike("native_figures")
        run = self._runs.get(domain)
        if run is None:
            return NativeFigures()
        return NativeFigures(
            bytes_sent=run.bytes_sent,
            remaining_bytes=run.pending_pages * PAGE_SIZE_BYTES,
            pages=run.bytes_sent // PAGE_SIZE_BYTES,
            error=run.error,
        )

    def under_way(self) -> list[str]:
        """The domains whose migration has begun, and is not past its switchover."""
        return [
            name
            for name, run in self._runs.items()
            if (guest := self._host.guests.get(name)) and guest.device_channel == run.channel
        ]

    def memory_of(self, guest: SimulatedGuest) -> dict[str, bytes]:
        """The memory as it goes over with the device state; {} if that isn't ours to send."""
        run = self._runs.get(guest.launch.spec.name)
        if run is None or guest.device_channel != run.channel:
            return {}
        return guest.populated()


def _channel(port: int) -> Path:
    return Path(f"/native/{port}")
