"""The ports: what the migration needs from the world, as abstract base classes.

Drivers in hypervisor/, storage/ and netfabric/ implement them, node_agent/ joins them up. Each port
has a simulated driver and one contract suite (tests/contract/) that runs on all its drivers.

Rules for every driver:
- an `async` method never blocks the event loop, and is bounded in time (the driver knows how long);
- it is idempotent where its docstring says so, so that recovery may repeat it;
- it raises its port's error (`HypervisorError`, `StorageError`, `FabricError`, `StoreError`), or
  leaves nothing half done; a cancelled call cleans up as a failed one does.
"""

from __future__ import annotations

import abc
import enum
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from migrator.connection_port import Connection as Connection
from migrator.connection_port import ConnectionTracker as ConnectionTracker
from migrator.connection_port import TakenConnections as TakenConnections
from migrator.errors import HypervisorError
from migrator.fabric_port import FabricDriver as FabricDriver
from migrator.fabric_port import FirstFrames as FirstFrames
from migrator.fabric_port import ProbeReport as ProbeReport
from migrator.fabric_port import Tunnel as Tunnel
from migrator.fabric_port import TunnelReport as TunnelReport
from migrator.fabric_port import WidthReport as WidthReport
from migrator.model import (
    BlockSource,
    DomainName,
    DomainSpec,
    DomainStatus,
    FencingToken,
    HypervisorCapabilities,
    OwnershipRecord,
)
from migrator.route_port import RouteDriver as RouteDriver
from migrator.struct import Struct as Struct
from migrator.volume_port import VolumeDriver as VolumeDriver

if TYPE_CHECKING:
    from migrator.native_port import NativeMigration

# --- hypervisor ------------------------------------------------------------------------------


class Launch(Struct, frozen=True, kw_only=True):
    """Everything a hypervisor needs to run a domain here: the spec, with its parts resolved."""

    spec: DomainSpec
    disks: tuple[BlockSource, ...]
    """In the order of `spec.disks`."""
    tap_fds: tuple[int, ...]
    """Open tap descriptors in the order of `spec.nics`. The caller closes its copies afterwards."""
    token: FencingToken


class RegionMapping(Struct, frozen=True, kw_only=True):
    """Where one piece of a memory region is mapped in the hypervisor's address space."""

    address: int
    length_bytes: int
    region_offset_bytes: int


class MemoryRegion(Struct, frozen=True, kw_only=True):
    """One region of guest memory: a descriptor of its backing file, and where it is mapped."""

    name: str
    fd: int
    size_bytes: int
    page_size_bytes: int
    mappings: tuple[RegionMapping, ...]


def close_regions(regions: Sequence[MemoryRegion]) -> None:
    import os

    for region in regions:
        os.close(region.fd)


class GuestMemory(Struct, frozen=True, kw_only=True):
    """A running guest's memory, opened from outside. Close it by `close()`: it owns descriptors."""

    pid: int
    regions: tuple[MemoryRegion, ...]
    uffd: int
    """A userfaultfd of the hypervisor's address space (a duplicate)."""
    pagemap_fd: int
    """An open /proc/PID/pagemap."""

    @property
    def fds(self) -> tuple[int, ...]:
        """Every descriptor, in a fixed order: uffd, pagemap, then each region's."""
        return (self.uffd, self.pagemap_fd, *(region.fd for region in self.regions))

    def close(self) -> None:
        import os

        for fd in self.fds:
            os.close(fd)


class DomainEventKind(enum.StrEnum):
    """What a hypervisor reports without being asked."""

    PAUSED = "paused"
    RESUMED = "resumed"
    PRE_SWITCHOVER = "pre-switchover"
    """The source stands still and waits for `continue_switchover`."""
    DEVICE_STATE_SENT = "device-state-sent"
    """The source's `completed`: it will not resume by itself any more."""
    DEVICE_STATE_LOADED = "device-state-loaded"
    """The destination is loaded and paused."""
    MIGRATION_FAILED = "migration-failed"
    PASS_BEGAN = "pass-began"
    """Of a hypervisor's own migration: it looked again for dirtied pages. `detail`: the number."""
    IO_ERROR = "io-error"
    PANICKED = "panicked"
    EXITED = "exited"


class DomainEvent(Struct, frozen=True, kw_only=True):
    domain: DomainName
    kind: DomainEventKind
    at_s: float
    """The hypervisor's own wall-clock time of the event where it gives one, else ours."""
    detail: str = ""
    crashed: bool = False
    """EXITED, and neither the guest nor anybody else had asked for it."""


class AbortOutcome(enum.Enum):
    """What a source did when it was told to give a switchover up."""

    INVALID = 0
    RESUMED = 1
    """It runs again."""
    SENT = 2
    """Too late: the device state is out (`postmigrate`). The ownership record decides now."""
    GONE = 3
    """The hypervisor process is dead."""


class HypervisorDriver(abc.ABC):
    """One node's hypervisor. Errors: HypervisorError; NotFoundError for a domain not here.

    A domain's process outlives the agent. `open` finds and adopts those that run.
    """

    name: ClassVar[str]

    @abc.abstractmethod
    async def open(self) -> Sequence[DomainName]:
        """Connect, adopt what runs, and return the adopted domains."""

    @abc.abstractmethod
    async def close(self) -> None:
        """Let go of every domain without disturbing it."""

    def crashed(self) -> Collection[DomainName]:
        """Whose processes have ended, after they had run, though nobody had asked for that.

        Known, also to the next driver in this boot, until the domain is launched or `forget_crash`:
        what follows from a crash is not lost with the agent that saw it. Of an end that no driver
        saw only where it is certain.
        """
        return ()

    async def forget_crash(self, domain: DomainName) -> None:  # noqa: B027 - where none is kept
        """The domain's record says what came of it. Idempotent."""

    @abc.abstractmethod
    async def capabilities(self) -> HypervisorCapabilities: ...

    async def cpu_lacks(
        self, model: str, domain: DomainName | None = None
    ) -> Collection[str] | None:
        """Features of a CPU model that a guest doesn't get here, as this host can't give them.

        Of `domain`, which runs here, those that it hasn't got. None: that isn't known.
        """
        return None

    @abc.abstractmethod
    def subscribe(self, callback: Callable[[DomainEvent], None]) -> Callable[[], None]:
        """Call back on each event, from the event loop, in order. Returns the unsubscriber."""

    @abc.abstractmethod
    async def start(self, launch: Launch) -> None:
        """Start a domain; when this returns its vCPUs run. On failure nothing is left."""

    @abc.abstractmethod
    async def start_incoming(self, launch: Launch) -> None:
        """Start a destination: paused, its devices made, waiting for device state.

        It takes the memory that was made ahead, if there is some, whether it succeeds or fails.
        """

    @abc.abstractmethod
    async def stop(self, domain: DomainName, *, timeout_s: float) -> bool:
        """Ask the guest to power off (ACPI); by force after `timeout_s`. True: by itself."""

    @abc.abstractmethod
    async def destroy(self, domain: DomainName) -> None:
        """End the domain's process now. Idempotent; returns when the process is gone."""

    @abc.abstractmethod
    async def pause(self, domain: DomainName) -> None: ...

    @abc.abstractmethod
    async def resume(self, domain: DomainName) -> float:
        """Run the vCPUs (`cont`). Returns when they run; gives the wall-clock time of it (s).

        Idempotent. Never call it on INCOMING or POSTMIGRATE without holding the newest token.

        NotResumedError, as NotFoundError: certainly no vCPU ran by this call. After any other
        error one may have, and may have written; a driver that can't tell must not claim to.
        """

    @abc.abstractmethod
    async def reset(self, domain: DomainName) -> None: ...

    @abc.abstractmethod
    async def inspect(self, domain: DomainName) -> DomainStatus:
        """STOPPED for a domain that is not here; never raises NotFoundError.

        Of one that was here, once its EXITED has been given out: how it ended decides what follows.
        """

    @abc.abstractmethod
    async def list_domains(self) -> Sequence[DomainStatus]: ...

    @abc.abstractmethod
    def console_log(self, domain: DomainName) -> Path:
        """The file that the guest's serial console is written to. It may not exist yet."""

    @abc.abstractmethod
    async def launched(self, domain: DomainName) -> DomainSpec | None:
        """The spec that the running process was started from; None if it isn't here."""

    async def launched_token(self, domain: DomainName) -> FencingToken | None:
        """The token that the running process was started under; None: it isn't here, or not known.

        A handoff, or a rollback, raises the domain's token without a new process: a record with a
        newer token is no contradiction, but one with an older token is.
        """
        return None

    async def launched_all(self) -> Sequence[DomainSpec]:
        """Those of all processes here. A driver that knows them needn't ask the processes."""
        names = [DomainName(status.name) for status in await self.list_domains()]
        found = [await self.launched(name) for name in names]
        return [spec for spec in found if spec is not None]

    # What the page engine needs of a source or a destination.

    @abc.abstractmethod
    async def memory(self, domain: DomainName) -> GuestMemory:
        """Open the guest's memory, at any time, also after the agent's restart."""

    async def make_memory_ahead(self, spec: DomainSpec) -> bool:
        """Make a destination's memory before `start_incoming`. False: the driver can't.

        `arriving_memory` may be written to from then on: the hypervisor that takes it touches none
        of it until it is given device state. HypervisorError: there is none.
        """
        return False

    async def drop_memory_ahead(self, domain: DomainName) -> None:
        """Give it back, if no hypervisor has taken it. Idempotent."""
        return

    async def arriving_memory(self, domain: DomainName) -> Sequence[MemoryRegion]:
        """A destination's, from `make_memory_ahead` on: maybe not mapped yet. The caller closes it.

        NotFoundError, HypervisorError: there is none, or none any more.
        """
        raise HypervisorError(f"{self.name} has no memory of {domain} before it is up")

    @abc.abstractmethod
    async def prepare_switchover(self, domain: DomainName) -> None:
        """Source: set all that can be set while the guest runs. Idempotent."""

    @abc.abstractmethod
    async def begin_switchover(self, domain: DomainName, device_channel: Path) -> None:
        """Source: stop the guest and send device state up to the last pages.

        The driver connects to the unix socket `device_channel`. Events follow: PAUSED,
        PRE_SWITCHOVER; or MIGRATION_FAILED and RESUMED.
        """

    @abc.abstractmethod
    async def continue_switchover(self, domain: DomainName) -> None:
        """Source in PRE_SWITCHOVER: send the rest. DEVICE_STATE_SENT follows."""

    @abc.abstractmethod
    async def abort_switchover(self, domain: DomainName) -> AbortOutcome:
        """Source: give up. Idempotent, also where no switchover was begun (RESUMED)."""

    @abc.abstractmethod
    async def receive_device_state(self, domain: DomainName, device_channel: Path) -> None:
        """Destination: listen on the unix socket. DEVICE_STATE_LOADED follows, or a failure."""

    @property
    def native(self) -> NativeMigration | None:
        """Its own migration, which needs no page engine; None: Ferry can't drive one."""
        return None


# --- ownership -------------------------------------------------------------------------------


class OwnershipStore(abc.ABC):
    """The cluster's ownership records. StoreError: unknown outcome, nothing may be assumed."""

    @abc.abstractmethod
    async def read(self, domain: DomainName) -> OwnershipRecord | None: ...

    @abc.abstractmethod
    async def compare_and_set(self, expected: OwnershipRecord | None, new: OwnershipRecord) -> bool:
        """Atomically replace `expected` (None: no record yet) by `new`. False: somebody won.

        `new` may equal `expected`: nothing changes, but after one that returned True no earlier
        write of unknown outcome succeeds any more, whoever gave it.
        """

    @abc.abstractmethod
    async def remove(self, expected: OwnershipRecord) -> bool:
        """Atomically delete the record if it still equals `expected`."""
