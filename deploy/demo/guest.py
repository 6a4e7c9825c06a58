"""The demo's guest on the cluster: through the HTTP API of one agent, as any user would.

volume -> domain -> start -> ready on its console ... migrate ... stop -> its disk, checked.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from deploy.guest.build import GuestImage
from deploy.guest.cmdline import guest_cmdline
from deploy.guest.disk_check import check_disk
from deploy.guest.protocol import READY, read_console
from deploy.guest.records import DiskReport
from deploy.lab.plan import GUEST_BRIDGE, LabPlan
from migrator.errors import FerryError
from migrator.model import (
    DiskSpec,
    DomainSpec,
    KernelBoot,
    Migration,
    NicSpec,
    OnTimeout,
    VolumeInfo,
)
from node_agent.cli.client import ApiClient
from node_agent.cli.errors import ApiProblem, Unreachable
from node_agent.resources import Domain, MigrationCreate, StartRequest, StopRequest, VolumeCreate

NAME: Final = "web1"
MEMORY_BYTES: Final = 256 * 1024**2
KEPT_MEMORY_MIB: Final = 64
"""Pages with known contents, which the guest verifies all the time."""
DIRTY_PAGES_PER_S: Final = 1000
VERIFY_PAGES_PER_S: Final = 1000
VOLUME_BYTES: Final = 32 * 1024**2
UDP_PORT: Final = 9999
POOL: Final = "default"
READY_TIMEOUT_S: Final = 120.0
"""Three seconds where the machine is idle."""
MIGRATION_TIMEOUT_S: Final = 120.0
STOP_TIMEOUT_S: Final = 20.0
_ADDRESS_NUMBER: Final = 10
_MAC: Final = "52:54:00:fe:00:01"
_POLL_S: Final = 0.1


@dataclass(frozen=True, slots=True)
class WebServer:
    """The guest `NAME` of a lab. Errors of all methods: CliError (the API), FerryError (ours)."""

    api: ApiClient
    plan: LabPlan

    @property
    def address(self) -> str:
        """IPv4, where clients find it."""
        return self.plan.guest_address(_ADDRESS_NUMBER)

    @property
    def image_path(self) -> Path:
        """Its disk, in the lab's directory pool."""
        return self.plan.volumes_path / f"{NAME}.raw"

    def create(self, image: GuestImage, node: str) -> None:
        """Make its volume, define it and start it on `node`."""
        volume = VolumeCreate(name=NAME, capacity_bytes=VOLUME_BYTES)
        self.api.post(f"/v1/pools/{POOL}/volumes", VolumeInfo, volume)
        cmdline = guest_cmdline(
            name=NAME,
            address=f"{self.address}/24",
            udp=f"{self.plan.client_guest_address}:{UDP_PORT}",
            memory_mib=KEPT_MEMORY_MIB,
            dirty_pages_per_s=DIRTY_PAGES_PER_S,
            verify_pages_per_s=VERIFY_PAGES_PER_S,
            disk=True,
        )
        spec = DomainSpec(
            name=NAME,
            memory_bytes=MEMORY_BYTES,
            disks=(DiskSpec(volume=NAME, pool=POOL),),
            nics=(NicSpec(mac=_MAC, bridge=GUEST_BRIDGE, addresses=(self.address,)),),
            boot=KernelBoot(kernel=str(image.kernel), initrd=str(image.initrd), cmdline=cmdline),
        )
        self.api.post("/v1/domains", Domain, spec)
        self.api.post(f"/v1/domains/{NAME}/start", Domain, StartRequest(node=node))

    def wait_ready(self) -> None:
        """Wait until its console says so. FerryError with the console's end if it never does."""
        deadline_s = time.monotonic() + READY_TIMEOUT_S
        while READY not in (text := self._console()):
            if time.monotonic() > deadline_s or read_console(text).errors:
                raise FerryError(f"the guest doesn't become ready; its console:\n{text[-1500:]}")
            time.sleep(_POLL_S)

    def migrate(self, destination: str) -> Migration:
        """Migrate it and wait for the end, which may be a failure.

        FerryError if there is no end within `MIGRATION_TIMEOUT_S`.
        """
        # A busy machine may be too slow for the default limit on the blackout: then let it be seen.
        body = MigrationCreate(destination=destination, on_timeout=OnTimeout.FORCE)
        migration = self.api.post(f"/v1/domains/{NAME}/migrations", Migration, body)
        path = f"/v1/migrations/{migration.id}"
        deadline_s = time.monotonic() + MIGRATION_TIMEOUT_S
        while not migration.ended:
            if time.monotonic() > deadline_s:
                raise FerryError(
                    f"the migration {migration.source} -> {migration.destination} is still "
                    f"{migration.state} after {MIGRATION_TIMEOUT_S:g} s"
                )
            time.sleep(_POLL_S)
            migration = self.api.get(path, Migration)
        return migration

    def stop(self) -> DiskReport:
        """Power it off and check every record on its disk."""
        body = StopRequest(timeout_s=STOP_TIMEOUT_S)
        self.api.post(f"/v1/domains/{NAME}/stop", Domain, body)
        try:
            return check_disk(self.image_path)
        except OSError as error:
            raise FerryError(f"the guest's disk can't be read: {error}") from error

    def _console(self) -> str:
        try:
            data = b"".join(self.api.chunks(f"/v1/domains/{NAME}/console"))
        except (ApiProblem, Unreachable) as error:
            raise FerryError(f"the guest's console can't be read: {error}") from error
        return data.decode(errors="replace")
