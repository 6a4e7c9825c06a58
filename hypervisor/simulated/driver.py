"""The simulated hypervisor: the port's contract without QEMU, for simulation and fast tests.

It behaves as the QEMU driver was measured to: a source in pre-switchover resumes by itself when
its switchover fails, a destination that loses its stream ends, `completed` waits for an owner.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import ClassVar

import msgspec

from hypervisor.simulated.host import DeviceState, SimulatedGuest, SimulatedHost
from hypervisor.simulated.native import SimulatedNative
from migrator.errors import HypervisorError, NotFoundError
from migrator.model import (
    PAGE_SIZE_BYTES,
    DomainName,
    DomainSpec,
    DomainState,
    DomainStatus,
    FencingToken,
    HypervisorCapabilities,
)
from migrator.ports import (
    AbortOutcome,
    DomainEvent,
    DomainEventKind,
    GuestMemory,
    HypervisorDriver,
    Launch,
    MemoryRegion,
    RegionMapping,
)

COME_UP = "come_up"
"""As an operation of `SimulatedFaults`: a destination's start, where pages came before it."""
MACHINE_TYPES = ("pc", "pc-i440fx-7.2", "pc-q35-7.2", "q35")
CPU_MODELS = ("max", "qemu64")
STANDING = frozenset({DomainState.PAUSED, DomainState.IO_ERROR, DomainState.POSTMIGRATE})
"""States that `resume` leaves."""


class SimulatedHypervisor(HypervisorDriver):
    """A driver on a SimulatedHost. `directory` is where console logs would be."""

    name: ClassVar[str] = "simulated"

    def __init__(self, host: SimulatedHost, directory: Path = Path("/nonexistent")) -> None:
        self.host = host
        self._directory = directory
        self._subscribers: list[Callable[[DomainEvent], None]] = []
        self._open = False
        self._ending: set[str] = set()
        """Gone, and those who listen have yet to hear of it."""
        self._native = SimulatedNative(host, self._receive)

    # --- the driver's life -----------------------------------------------------------------

    async def open(self) -> Sequence[DomainName]:
        await self.host.faults.strike("open")
        self._open = True
        self.host.listener = self._deliver
        return [DomainName(name) for name in sorted(self.host.guests)]

    async def close(self) -> None:
        if self._open:
            self._open = False
            self.host.listener = None
            for domain in self._native.under_way():
                self._cancel(self.host.guests[domain])

    def crashed(self) -> Collection[DomainName]:
        return [DomainName(name) for name in sorted(self.host.crashed)]

    def _deliver(self, event: DomainEvent) -> None:
        """Events come from the event loop, not from inside the call that caused them."""
        if event.kind is DomainEventKind.EXITED:
            self._ending.add(event.domain)
        asyncio.get_running_loop().call_soon(self._call_back, event)

    def _call_back(self, event: DomainEvent) -> None:
        if event.kind is DomainEventKind.EXITED:
            self._ending.discard(event.domain)
        for callback in list(self._subscribers):
            callback(event)

    def subscribe(self, callback: Callable[[DomainEvent], None]) -> Callable[[], None]:
        self._subscribers.append(callback)

        def unsubscribe() -> None:
            if callback in self._subscribers:
                self._subscribers.remove(callback)

        return unsubscribe

    async def capabilities(self) -> HypervisorCapabilities:
        return HypervisorCapabilities(
            driver=self.name,
            version="1",
            accelerator="none",
            machine_types=MACHINE_TYPES,
            cpu_models=CPU_MODELS,
        )

    async def cpu_lacks(
        self, model: str, domain: DomainName | None = None
    ) -> Collection[str] | None:
        return self.host.cpu_lacks

    # --- a domain's life -------------------------------------------------------------------

    async def start(self, launch: Launch) -> None:
        guest = await self._spawn("start", launch, incoming=False)
        self._run(guest)

    async def start_incoming(self, launch: Launch) -> None:
        early = launch.spec.name in self.host.memory_ahead
        try:
            guest = await self._spawn("start_incoming", launch, incoming=True)
        finally:
            self.host.drop_memory_ahead(launch.spec.name)
        if not early:
            return
        try:
            await self.host.faults.strike(COME_UP)
        except BaseException:
            self.host.discard(guest)
            raise
        if self.host.guests.get(launch.spec.name) is not guest:
            raise HypervisorError(f"{launch.spec.name} didn't start: it ended")

    async def _spawn(self, operation: str, launch: Launch, *, incoming: bool) -> SimulatedGuest:
        if not self._open:
            raise HypervisorError("the simulated driver is not open")
        await self.host.faults.strike(operation)
        if launch.spec.name in self.host.guests:
            raise HypervisorError(f"{launch.spec.name} is here already; nothing was started")
        return self.host.spawn(launch, incoming=incoming)

    async def stop(self, domain: DomainName, *, timeout_s: float) -> bool:
        guest = self._guest(domain)
        await self.host.faults.strike("stop")
        hears = guest.state is DomainState.RUNNING
        if hears and not self.host.faults.ignores_power_button:
            self.host.power_off(domain)
            return True
        if hears:
            await asyncio.sleep(timeout_s)
        self.host.kill(domain, "powered off by force")
        return False

    async def destroy(self, domain: DomainName) -> None:
        await self.host.faults.strike("destroy")
        self.host.kill(domain, "destroyed")

    async def forget_crash(self, domain: DomainName) -> None:
        self.host.crashed.discard(domain)

    async def pause(self, domain: DomainName) -> None:
        guest = self._guest(domain)
        await self.host.faults.strike("pause")
        if guest.state is DomainState.RUNNING:
            guest.halt(DomainState.PAUSED, self.host.clock())
            self.host.emit(domain, DomainEventKind.PAUSED)

    async def resume(self, domain: DomainName) -> float:
        guest = self._guest(domain)
        await self.host.faults.strike("resume")
        if guest.state is DomainState.RUNNING:
            return self.host.clock()
        if guest.state in STANDING or guest.state is DomainState.LOADED:
            self._run(guest)
            return self.host.clock()
        raise HypervisorError(f"{domain}: can't be resumed: its state is {guest.state}")

    def _run(self, guest: SimulatedGuest) -> None:
        guest.run(self.host.clock())
        self.host.emit(guest.launch.spec.name, DomainEventKind.RESUMED)

    async def reset(self, domain: DomainName) -> None:
        guest = self._guest(domain)
        await self.host.faults.strike("reset")
        if guest.state is DomainState.CRASHED:
            self._run(guest)

    # --- what is known ---------------------------------------------------------------------

    def _guest(self, domain: DomainName) -> SimulatedGuest:
        guest = self.host.guests.get(domain)
        if guest is None:
            raise NotFoundError(f"domain {domain} has no process here")
        return guest

    async def inspect(self, domain: DomainName) -> DomainStatus:
        while domain in self._ending:  # noqa: ASYNC110 - the event loop's next turn tells it.
            await asyncio.sleep(0)
        guest = self.host.guests.get(domain)
        if guest is None:
            return DomainStatus(name=domain, state=DomainState.STOPPED)
        return DomainStatus(
            name=domain,
            state=guest.state,
            pid=guest.pid,
            reason=guest.reason,
            memory_in_use_bytes=guest.memory_in_use_bytes,
        )

    async def list_domains(self) -> Sequence[DomainStatus]:
        names = sorted({*self.host.guests, *self._ending})
        return [await self.inspect(DomainName(name)) for name in names]

    def console_log(self, domain: DomainName) -> Path:
        return self._directory / f"{domain}.console.log"

    async def launched(self, domain: DomainName) -> DomainSpec | None:
        guest = self.host.guests.get(domain)
        return None if guest is None else guest.launch.spec

    async def launched_token(self, domain: DomainName) -> FencingToken | None:
        guest = self.host.guests.get(domain)
        return None if guest is None else guest.launch.token

    # --- what the page engine needs --------------------------------------------------------

    async def make_memory_ahead(self, spec: DomainSpec) -> bool:
        await self.host.faults.strike("make_memory_ahead")
        self.host.make_memory_ahead(spec)
        return True

    async def drop_memory_ahead(self, domain: DomainName) -> None:
        self.host.drop_memory_ahead(domain)

    async def arriving_memory(self, domain: DomainName) -> Sequence[MemoryRegion]:
        if (made := self.host.memory_ahead.get(domain)) is not None:
            return (_region(made, ()),)
        memory = await self.memory(domain)
        os.close(memory.uffd)
        os.close(memory.pagemap_fd)
        return memory.regions

    async def memory(self, domain: DomainName) -> GuestMemory:
        """The memfd is real; the userfaultfd and the pagemap are /dev/null: nothing is mapped."""
        guest = self._guest(domain)
        await self.host.faults.strike("memory")
        size = guest.launch.spec.memory_bytes
        mapping = RegionMapping(address=0, length_bytes=size, region_offset_bytes=0)
        region = _region(guest.memory_fd, (mapping,))
        return GuestMemory(
            pid=guest.pid,
            regions=(region,),
            uffd=os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC),
            pagemap_fd=os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC),
        )

    async def prepare_switchover(self, domain: DomainName) -> None:
        self._guest(domain)
        await self.host.faults.strike("prepare_switchover")

    async def begin_switchover(self, domain: DomainName, device_channel: Path) -> None:
        guest = self._guest(domain)
        await self.host.faults.strike("begin_switchover")
        if guest.state not in (DomainState.RUNNING, DomainState.PAUSED):
            raise HypervisorError(f"{domain}: can't be switched over: its state is {guest.state}")
        if not self.host.channels.reaches(device_channel):
            self.host.emit(domain, DomainEventKind.MIGRATION_FAILED, "failed")
            return
        guest.state_before_switchover = guest.state
        guest.device_channel = device_channel
        guest.halt(DomainState.PRE_SWITCHOVER, self.host.clock())
        self.host.emit(domain, DomainEventKind.PAUSED)
        self.host.emit(domain, DomainEventKind.PRE_SWITCHOVER)

    async def continue_switchover(self, domain: DomainName) -> None:
        guest = self._guest(domain)
        await self.host.faults.strike("continue_switchover")
        if guest.state is not DomainState.PRE_SWITCHOVER or guest.device_channel is None:
            raise HypervisorError(f"{domain}: can't go on: its state is {guest.state}")
        spec = guest.launch.spec
        payload = msgspec.json.encode(
            DeviceState(
                domain=spec.name,
                machine=spec.machine,
                ran_s=guest.ran_s(self.host.clock()),
                memory=self._native.memory_of(guest),
            )
        )
        path, guest.device_channel = guest.device_channel, None
        if self.host.channels.send(path, payload):
            guest.state = DomainState.POSTMIGRATE
            self.host.emit(domain, DomainEventKind.DEVICE_STATE_SENT)
        else:
            self._give_up(guest, "failed")

    async def abort_switchover(self, domain: DomainName) -> AbortOutcome:
        await self.host.faults.strike("abort_switchover")
        guest = self.host.guests.get(domain)
        if guest is None:
            return AbortOutcome.GONE
        if guest.state is DomainState.POSTMIGRATE:
            return AbortOutcome.SENT
        self._cancel(guest)
        return AbortOutcome.RESUMED

    def _cancel(self, guest: SimulatedGuest) -> None:
        """End what was begun of a migration, if anything was."""
        if guest.state is DomainState.PRE_SWITCHOVER:
            self.host.close_channel(guest)
            self._give_up(guest, "cancelled")
        elif guest.device_channel is not None and not guest.incoming:
            self.host.close_channel(guest)
            name = guest.launch.spec.name
            self.host.emit(name, DomainEventKind.MIGRATION_FAILED, "cancelled")

    def _give_up(self, guest: SimulatedGuest, detail: str) -> None:
        """The source is as it was before its switchover."""
        if guest.state_before_switchover is DomainState.RUNNING:
            self._run(guest)
        else:
            guest.state = guest.state_before_switchover
        self.host.emit(guest.launch.spec.name, DomainEventKind.MIGRATION_FAILED, detail)

    async def receive_device_state(self, domain: DomainName, device_channel: Path) -> None:
        guest = self._guest(domain)
        await self.host.faults.strike("receive_device_state")
        if guest.state is not DomainState.INCOMING or guest.loaded:
            raise HypervisorError(f"{domain}: can't receive: its state is {guest.state}")
        self._receive(domain, device_channel)

    @property
    def native(self) -> SimulatedNative:
        return self._native

    def _receive(self, domain: DomainName, device_channel: Path) -> None:
        guest, host = self._guest(domain), self.host
        guest.device_channel = device_channel

        def deliver(payload: bytes | None) -> None:
            guest.device_channel = None
            if payload is None:
                host.emit(domain, DomainEventKind.MIGRATION_FAILED, "failed")
                host.kill(domain, "QEMU exited: 1")
                return
            guest.load(msgspec.json.decode(payload, type=DeviceState))
            host.emit(domain, DomainEventKind.DEVICE_STATE_LOADED)

        host.channels.listen(device_channel, deliver)


def _region(memory_fd: int, mappings: tuple[RegionMapping, ...]) -> MemoryRegion:
    return MemoryRegion(
        name="ram0",
        fd=os.dup(memory_fd),
        size_bytes=os.fstat(memory_fd).st_size,
        page_size_bytes=PAGE_SIZE_BYTES,
        mappings=mappings,
    )
