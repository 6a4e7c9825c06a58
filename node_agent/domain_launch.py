"""From a domain's spec to what a hypervisor starts: volumes opened, taps plugged.

A start and a migration's destination both go through here, so that both undo the same way.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence

from migrator.errors import ConflictError, FabricError, RefusedError, StorageError
from migrator.model import (
    BlockSource,
    DiskSpec,
    DomainName,
    DomainSpec,
    FencingToken,
    PoolName,
    VolumeName,
)
from migrator.ports import FabricDriver, Launch, VolumeDriver
from node_agent.background import uninterrupted
from node_agent.closings import Closings

log = logging.getLogger(__name__)
Claim = Callable[[PoolName], Awaitable[None]]
"""Before a pool's volumes are opened: ConflictError if it is another cluster's (`pool_owners`)."""


class LaunchUndo:
    """What was opened for a `Launch`. Call `release` after a successful start, else `await` it."""

    def __init__(self, builder: LaunchBuilder, spec: DomainSpec, token: FencingToken) -> None:
        self._builder = builder
        self._spec = spec
        self._token = token
        self.tap_fds: list[int] = []

    def release(self) -> None:
        """Close our copies of the tap descriptors: the hypervisor has its own. Idempotent.

        From here on its process, where there is one, is what keeps its volumes open.
        """
        while self.tap_fds:
            os.close(self.tap_fds.pop())
        self._builder.closings.end(self._spec)

    async def __call__(self) -> None:
        """Close and unplug everything. Idempotent, runs to its end, never raises a FerryError."""
        self.release()
        await uninterrupted(self._builder.tear_down(self._spec, self._token))


class LaunchBuilder:
    """Resolves specs on one node."""

    def __init__(
        self,
        pools: Mapping[PoolName, VolumeDriver],
        fabric: FabricDriver,
        claim: Claim | None = None,
        closings: Closings | None = None,
    ) -> None:
        """`closings`: None: of its own, which are noted nowhere and know of no process."""
        self._pools = pools
        self._fabric = fabric
        self._claim = claim
        self.closings = closings or Closings(pools, _nobody)
        self._foreign: set[PoolName] = set()
        """Pools that were found to be another cluster's: nothing is closed there."""

    def pool(self, disk: DiskSpec) -> VolumeDriver:
        """StorageError if this node has no such pool."""
        driver = self._pools.get(PoolName(disk.pool))
        if driver is None:
            raise StorageError(f"this node has no pool {disk.pool}; nothing was opened")
        return driver

    async def claim(self, spec: DomainSpec) -> None:
        """See to it that its pools are this cluster's (`Claim`). ConflictError, StorageError."""
        if self._claim is None:
            return
        for disk in spec.disks:
            self.pool(disk)
        for name in sorted({PoolName(disk.pool) for disk in spec.disks}):
            try:
                await self._claim(name)
            except ConflictError:
                self._foreign.add(name)
                raise
            self._foreign.discard(name)

    async def build(self, spec: DomainSpec, token: FencingToken) -> tuple[Launch, LaunchUndo]:
        """Open the volumes under `token` and plug the taps.

        RefusedError (network), StorageError, NotFoundError (volume), FabricError: all is undone.
        ConflictError (a pool is another cluster's): nothing was done.
        """
        domain = DomainName(spec.name)
        reasons = [reason for nic in spec.nics for reason in await self._fabric.check(nic)]
        if reasons:
            raise RefusedError(f"domain {domain} can't be plugged here: {reasons[0]}", reasons)
        await self.claim(spec)  # Nothing is undone in a pool that isn't ours: nothing was done.
        undo = LaunchUndo(self, spec, token)
        sources: list[BlockSource] = []
        self.closings.begin(spec)
        try:
            for disk in spec.disks:
                pool, volume = self.pool(disk), VolumeName(disk.volume)
                async with self.closings.turn(disk.pool, disk.volume):
                    sources.append(await pool.open(volume, token, read_only=disk.read_only))
            for index, nic in enumerate(spec.nics):
                undo.tap_fds.append(await self._fabric.plug(domain, index, nic))
        except BaseException:
            await undo()
            raise
        launch = Launch(spec=spec, disks=tuple(sources), tap_fds=tuple(undo.tap_fds), token=token)
        return launch, undo

    async def fence(self, spec: DomainSpec, token: FencingToken) -> str:
        """Shut older tokens out of every writable volume, of all at once. Idempotent.

        Returns how long each took, by driver. FenceError: at least one is unconfirmed.
        """
        fences = [self._fence(disk, token) for disk in spec.disks if not disk.read_only]
        results = await asyncio.gather(*fences, return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException):
                raise result
        return ", ".join(str(result) for result in results)

    async def _fence(self, disk: DiskSpec, token: FencingToken) -> str:
        pool, begun_s = self.pool(disk), time.monotonic()
        await pool.fence(VolumeName(disk.volume), token)
        took_ms = 1000 * (time.monotonic() - begun_s)
        return f"{pool.name} {disk.pool}/{disk.volume} {took_ms:.1f} ms"

    async def newest_fence(self, spec: DomainSpec) -> FencingToken:
        """The newest token that ever fenced one of its writable volumes; 0 if none did.

        Volumes outlive definitions: a domain defined anew must not start below it.
        """
        newest = FencingToken(0)
        for disk in spec.disks:
            if not disk.read_only:
                token = await self.pool(disk).verify(VolumeName(disk.volume))
                newest = max(newest, token or FencingToken(0))
        return newest

    def shuts_others_out(self, spec: DomainSpec) -> bool:
        """Whether a fence keeps any other node from writing to each of its writable volumes."""
        writable = [disk for disk in spec.disks if not disk.read_only]
        return all(self.pool(disk).fences_remote_writers for disk in writable)

    async def tear_down(self, spec: DomainSpec, token: FencingToken) -> None:
        """Unplug the taps and close the volumes of a domain whose process is gone.

        Goes on past errors, and logs them: closing and unplugging are idempotent, and neither
        keeps anybody from starting the domain again. What isn't closed now is later (`closings`).
        What is known to be another cluster's is left alone: there a node of this one's name may
        have it open.
        """
        for index, _ in enumerate(spec.nics):
            try:
                await self._fabric.unplug(DomainName(spec.name), index)
            except FabricError as error:
                log.warning("domain %s: unplugging NIC %d: %s", spec.name, index, error)
        for disk in spec.disks:
            if PoolName(disk.pool) in self._foreign:
                continue
            await self.closings.let_go(
                spec.name, PoolName(disk.pool), VolumeName(disk.volume), token
            )


async def _nobody() -> Sequence[DomainSpec]:
    return ()
