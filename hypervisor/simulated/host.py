"""What outlives the agent in a simulation: one machine's guests, and the channels between machines.

A SimulatedHost stands for the processes of one node. Drop the driver and make another on the same
host: that is an agent's crash and restart. The host is also where a test reaches in: it breaks
disks, kills processes, presses guests to panic, and looks at what runs.

Deterministic: time comes from the clock that the driver was given, and nothing is random.
"""

from __future__ import annotations

import asyncio
import os
from collections import deque
from collections.abc import Callable, Collection
from pathlib import Path

import msgspec

from migrator.errors import HypervisorError
from migrator.model import DomainName, DomainSpec, DomainState
from migrator.ports import DomainEvent, DomainEventKind, Launch

Deliver = Callable[[bytes | None], None]
"""Takes the whole device state, or None when the sender went away before it was complete."""


class SimulatedChannels:
    """The unix sockets of all simulated hosts, and the relays between them, as a dictionary."""

    def __init__(self) -> None:
        self._listeners: dict[Path, Deliver] = {}
        self._links: dict[Path, Path] = {}

    def link(self, source: Path, destination: Path) -> None:
        """Relay what is sent to `source` to `destination`, as a migration's engines do."""
        self._links[source] = destination

    def cut(self, source: Path) -> None:
        """End the relay; both ends notice when they next use it."""
        self._links.pop(source, None)

    def listen(self, path: Path, deliver: Deliver) -> None:
        self._listeners[path] = deliver

    def unlisten(self, path: Path) -> None:
        self._listeners.pop(path, None)

    def reaches(self, path: Path) -> bool:
        """Whether somebody listens at the far end of `path`."""
        return self._links.get(path, path) in self._listeners

    def send(self, path: Path, payload: bytes | None) -> bool:
        """Deliver to the far end; False if nobody is there."""
        deliver = self._listeners.pop(self._links.get(path, path), None)
        if deliver is None:
            return False
        deliver(payload)
        return True


class SimulatedFaults:
    """What goes wrong on one host. Operations are named as the driver's methods."""

    def __init__(self) -> None:
        self.failing: dict[str, int] = {}
        """Operation -> how many of its next calls raise HypervisorError, changing nothing."""
        self.delays_s: dict[str, float] = {}
        """Operation -> how long each call takes before it acts (the event loop's time)."""
        self.hanging: set[str] = set()
        """Operations that do not return until they are taken out and `release` is called."""
        self.ignores_power_button = False
        self._released = asyncio.Event()

    def release(self) -> None:
        """Let the calls go that hang; they look again at what is wrong."""
        self._released.set()
        self._released = asyncio.Event()

    async def strike(self, operation: str) -> None:
        """Do to a call what is set for it."""
        while operation in self.hanging:
            await self._released.wait()
        if (delay := self.delays_s.get(operation, 0.0)) > 0:
            await asyncio.sleep(delay)
        if self.failing.get(operation, 0) > 0:
            self.failing[operation] -= 1
            raise HypervisorError(f"simulated fault: {operation} failed and changed nothing")


class DeviceState(msgspec.Struct, frozen=True, kw_only=True):
    """What the source's devices and vCPUs hold, as sent to the destination."""

    domain: str
    machine: str
    ran_s: float
    memory: dict[str, bytes] = {}
    """Populated extents by their offset, where the hypervisor moves the memory itself."""


class SimulatedGuest:
    """One simulated process: a state, a memfd as memory, and how long its vCPUs have run."""

    def __init__(
        self, launch: Launch, pid: int, *, incoming: bool, memory_fd: int | None = None
    ) -> None:
        """`memory_fd`: its memory, which it takes over."""
        self.launch = launch
        self.pid = pid
        self.incoming = incoming
        self.loaded = False
        self.state = DomainState.INCOMING if incoming else DomainState.STARTING
        self.reason: str | None = None
        self.state_before_switchover = DomainState.RUNNING
        self.device_channel: Path | None = None
        self.memory_fd = _make_memory(launch.spec) if memory_fd is None else memory_fd
        self._ran_s = 0.0
        self._runs_since_s: float | None = None

    def ran_s(self, now: float) -> float:
        """How long its vCPUs have run, on any host: it moves with the device state."""
        return self._ran_s + (now - self._runs_since_s if self._runs_since_s is not None else 0.0)

    def run(self, now: float) -> None:
        self.state = DomainState.RUNNING
        self.reason = None
        self.incoming = False
        self._runs_since_s = now

    def halt(self, state: DomainState, now: float, reason: str | None = None) -> None:
        self._ran_s = self.ran_s(now)
        self._runs_since_s = None
        self.state = state
        self.reason = reason

    def load(self, device_state: DeviceState) -> None:
        self._ran_s = device_state.ran_s
        for offset, data in device_state.memory.items():
            os.pwrite(self.memory_fd, data, int(offset))
        self.loaded = True
        self.state = DomainState.LOADED

    def write_memory(self, offset_bytes: int, data: bytes) -> None:
        """What the guest itself would write. HypervisorError unless its vCPUs run."""
        if self.state is not DomainState.RUNNING:
            raise HypervisorError(f"{self.launch.spec.name} doesn't run: it can't write")
        os.pwrite(self.memory_fd, data, offset_bytes)

    def read_memory(self, offset_bytes: int, length_bytes: int) -> bytes:
        return os.pread(self.memory_fd, length_bytes, offset_bytes)

    def populated(self) -> dict[str, bytes]:
        """Every populated extent by its offset."""
        found: dict[str, bytes] = {}
        offset = 0
        while offset < self.launch.spec.memory_bytes:
            try:
                start = os.lseek(self.memory_fd, offset, os.SEEK_DATA)
            except OSError:  # None is left.
                break
            offset = os.lseek(self.memory_fd, start, os.SEEK_HOLE)
            found[str(start)] = self.read_memory(start, offset - start)
        return found

    @property
    def memory_in_use_bytes(self) -> int:
        return os.fstat(self.memory_fd).st_blocks * 512


def _make_memory(spec: DomainSpec) -> int:
    made = os.memfd_create(f"simulated-{spec.name}", os.MFD_CLOEXEC)
    os.ftruncate(made, spec.memory_bytes)
    return made


class SimulatedHost:
    """One machine: its guests by name. `emit` goes to the driver that is open on it, if any."""

    def __init__(self, channels: SimulatedChannels, clock: Callable[[], float]) -> None:
        self.channels = channels
        self.clock = clock
        self.faults = SimulatedFaults()
        self.guests: dict[str, SimulatedGuest] = {}
        self.memory_ahead: dict[str, int] = {}
        """Made before the destination that will take it."""
        self.native_pending: deque[int] = deque()
        """Pages that are dirty again at the end of each pass of the hypervisor's own migration."""
        self.listener: Callable[[DomainEvent], None] | None = None
        self.crashed: set[str] = set()
        self.cpu_lacks: Collection[str] | None = None
        """What every CPU model lacks here, and every guest that was started here."""
        """While no driver was open."""
        self._next_pid = 1000

    def spawn(self, launch: Launch, *, incoming: bool) -> SimulatedGuest:
        self._next_pid += 1
        made = self.memory_ahead.pop(launch.spec.name, None)
        guest = SimulatedGuest(launch, self._next_pid, incoming=incoming, memory_fd=made)
        self.guests[launch.spec.name] = guest
        self.crashed.discard(launch.spec.name)
        return guest

    def make_memory_ahead(self, spec: DomainSpec) -> None:
        self.drop_memory_ahead(spec.name)
        self.memory_ahead[spec.name] = _make_memory(spec)

    def drop_memory_ahead(self, domain: str) -> None:
        """Idempotent."""
        made = self.memory_ahead.pop(domain, None)
        if made is not None:
            os.close(made)

    def kill(
        self, domain: str, reason: str = "QEMU was killed by signal 9", *, crashed: bool = False
    ) -> None:
        """End a guest's process at once, as SIGKILL would. Idempotent."""
        guest = self.guests.pop(domain, None)
        if guest is None:
            return
        guest.halt(DomainState.STOPPED, self.clock())
        self.close_channel(guest)
        os.close(guest.memory_fd)
        if crashed:
            self.crashed.add(domain)
        self.emit(domain, DomainEventKind.EXITED, reason, crashed=crashed)

    def discard(self, guest: SimulatedGuest) -> None:
        """End a process whose start failed: no event tells of that."""
        name = guest.launch.spec.name
        if self.guests.get(name) is guest:
            del self.guests[name]
            os.close(guest.memory_fd)

    def close_channel(self, guest: SimulatedGuest) -> None:
        """Drop the guest's end of its device channel; the other end is told."""
        path, guest.device_channel = guest.device_channel, None
        if path is None:
            return
        if guest.incoming:
            self.channels.unlisten(path)
        else:
            self.channels.send(path, None)

    def power_off(self, domain: str) -> None:
        """The guest powers itself off."""
        self.kill(domain, "powered off by the guest")

    def fail_disk(self, domain: str, cause: str = "Input/output error") -> None:
        """A disk error stops the guest, as werror=stop does."""
        self.guests[domain].halt(DomainState.IO_ERROR, self.clock(), f"write of disk0: {cause}")
        self.emit(domain, DomainEventKind.IO_ERROR, cause)
        self.emit(domain, DomainEventKind.PAUSED)

    def emit(
        self, domain: str, kind: DomainEventKind, detail: str = "", *, crashed: bool = False
    ) -> None:
        if self.listener is not None:
            self.listener(
                DomainEvent(
                    domain=DomainName(domain),
                    kind=kind,
                    at_s=self.clock(),
                    detail=detail,
                    crashed=crashed,
                )
            )
