"""The pools of this node, which all nodes of a cluster are expected to share, and their volumes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from migrator.errors import ConflictError, InvalidRequest, NotFoundError
from migrator.model import PoolName, VolumeInfo, VolumeName
from migrator.ports import VolumeDriver
from node_agent.domain_records import DomainRecords
from node_agent.resources import Pool, VolumeCreate


class VolumeService:
    """Errors: NotFoundError (pool or volume), ConflictError, StorageError."""

    def __init__(self, pools: Mapping[PoolName, VolumeDriver], records: DomainRecords) -> None:
        self._pools = pools
        self._records = records

    async def list_pools(self) -> Sequence[Pool]:
        """By name."""
        return [
            Pool(name=name, driver=pool.name, fences_remote_writers=pool.fences_remote_writers)
            for name, pool in sorted(self._pools.items())
        ]

    async def list_volumes(self, pool: PoolName) -> Sequence[VolumeInfo]:
        """Every volume of one pool."""
        return await self._pool(pool).list_volumes()

    async def create(self, pool: PoolName, request: VolumeCreate) -> VolumeInfo:
        """ConflictError if it exists. On failure nothing is left."""
        driver = self._pool(pool)
        image = None if request.image is None else Path(request.image)
        if image is not None and not image.is_absolute():
            right = "an absolute path on the node"
            raise InvalidRequest(f"image must be {right}", {"image": right})
        return await driver.create(
            VolumeName(request.name),
            capacity_bytes=request.capacity_bytes,
            format=request.format,
            image=image,
        )

    async def delete(self, pool: PoolName, volume: VolumeName) -> None:
        """ConflictError while it is a disk of a defined domain; nothing was deleted."""
        driver = self._pool(pool)
        for name, record in (await self._records.list_records()).items():
            if any((disk.pool, disk.volume) == (pool, volume) for disk in record.spec.disks):
                raise ConflictError(
                    f"volume {pool}/{volume} is a disk of domain {name}; it was not deleted"
                )
        await driver.delete(volume)

    def _pool(self, pool: PoolName) -> VolumeDriver:
        driver = self._pools.get(pool)
        if driver is None:
            raise NotFoundError(f"there is no pool {pool}")
        return driver
