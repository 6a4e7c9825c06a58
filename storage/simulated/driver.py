"""A pool in memory that remembers who wrote under which token.

    node a: SimulatedPool ─┐
                           ├─ SharedVolumes: the volumes, their newest tokens, every write
    node b: SimulatedPool ─┘

A simulated guest writes by `SimulatedPool.write`. The record answers the question that a checker
asks: `SharedVolumes.stale_writes()`, the writes that reached a volume under an old token. With
`enforces=False` the pool takes such writes, as a shared folder does: then the record shows
whether the handoff alone keeps the old writer quiet.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Final

import msgspec

from migrator.errors import (
    ConflictError,
    FenceError,
    InvalidRequest,
    NotFoundError,
    StorageError,
    TooLargeError,
)
from migrator.model import (
    BlockSource,
    DiskFormat,
    Fencing,
    FencingToken,
    FileSource,
    NodeName,
    PoolHealth,
    PoolName,
    PoolOwner,
    VolumeInfo,
    VolumeName,
)
from migrator.ports import VolumeDriver
from storage.marks import stays
from storage.names import (
    capacity_below_image,
    check_capacity,
    check_growth,
    check_volume_name,
    linked_unsupported,
)

_STALL_POLL_S: Final = 0.01


@dataclass(frozen=True, slots=True)
class WriteRecord:
    """One attempt to write. `newest` is the token that had fenced the volume at that moment."""

    node: NodeName
    volume: VolumeName
    token: FencingToken
    newest: FencingToken | None
    reached: bool

    @property
    def stale(self) -> bool:
        """Whether it reached the volume under an old token: what must never be."""
        return self.reached and self.newest is not None and self.token < self.newest


@dataclass(slots=True)
class PoolFaults:
    """What goes wrong for one node, until set back."""

    stalled: bool = False
    """Calls wait, and fail when the node's `timeout_s` is over."""
    full: bool = False
    """Nothing can be created."""
    lost: bool = False
    """Every call fails at once."""


@dataclass(slots=True)
class _Volume:
    info: VolumeInfo
    newest: FencingToken | None = None
    opened: set[tuple[NodeName, FencingToken]] = field(default_factory=set)


@dataclass(slots=True)
class SharedVolumes:
    """What all nodes share."""

    enforces: bool = True
    """Whether the storage itself refuses a write under an old token."""
    capacity_bytes: int = 1 << 40
    writes: list[WriteRecord] = field(default_factory=list)
    volumes: dict[VolumeName, _Volume] = field(default_factory=dict)
    owner: PoolOwner | None = None
    """Whose pool it is, where somebody has said so."""

    def stale_writes(self) -> list[WriteRecord]:
        return [write for write in self.writes if write.stale]

    def writers(self, volume: VolumeName) -> dict[FencingToken, int]:
        """How many writes reached the volume under each token."""
        counts: dict[FencingToken, int] = {}
        for write in self.writes:
            if write.volume == volume and write.reached:
                counts[write.token] = counts.get(write.token, 0) + 1
        return counts


class SimulatedPool(VolumeDriver):
    """One node's view of a pool. `timeout_s`: how long a call waits on a stalled pool."""

    name: ClassVar[str] = "simulated"

    def __init__(
        self,
        pool: PoolName,
        shared: SharedVolumes | None = None,
        node: NodeName | None = None,
        faults: PoolFaults | None = None,
        *,
        timeout_s: float = 5.0,
    ) -> None:
        self.pool = pool
        self.shared = shared or SharedVolumes()
        self.node = node or NodeName("node")
        self.faults = faults or PoolFaults()
        self._timeout_s = timeout_s

    @property
    def fencing(self) -> Fencing:
        if self.shared.enforces:
            return Fencing(remote_writers=True, method="simulated: refuses writes of old tokens")
        return Fencing(remote_writers=False, method="simulated: takes every write")

    async def health(self) -> PoolHealth:
        try:
            await self._reach()
        except StorageError as error:
            return PoolHealth(reachable=False, reason=str(error))
        total = self.shared.capacity_bytes
        return PoolHealth(reachable=True, capacity_bytes=total, free_bytes=total - self._used())

    async def owner(
        self, claimant: PoolOwner | None = None, *, instead_of: str | None = None
    ) -> PoolOwner | None:
        await self._reach()
        if claimant is not None and not stays(self.shared.owner, claimant, instead_of):
            self.shared.owner = claimant
        return self.shared.owner

    async def create(
        self,
        volume: VolumeName,
        *,
        capacity_bytes: int,
        format: DiskFormat,
        image: Path | None = None,
    ) -> VolumeInfo:
        check_volume_name(volume)
        check_capacity(volume, capacity_bytes)
        await self._reach()
        if volume in self.shared.volumes:
            raise ConflictError(f"pool {self.pool} has a volume {volume} already")
        allocated_bytes = await asyncio.to_thread(_size_bytes, image) if image else 0
        if allocated_bytes > capacity_bytes:
            raise capacity_below_image(volume, capacity_bytes, allocated_bytes)
        self._refuse_if_full(capacity_bytes)
        info = VolumeInfo(
            pool=self.pool,
            name=volume,
            format=format,
            capacity_bytes=capacity_bytes,
            allocated_bytes=allocated_bytes,
        )
        self.shared.volumes[volume] = _Volume(info)
        return info

    async def inspect(self, volume: VolumeName) -> VolumeInfo:
        return (await self._find(volume)).info

    async def list_volumes(self) -> Sequence[VolumeInfo]:
        await self._reach()
        return [self.shared.volumes[volume].info for volume in sorted(self.shared.volumes)]

    async def delete(self, volume: VolumeName) -> None:
        """ConflictError while a node has it open under the newest token."""
        found = await self._find(volume)
        newest = found.newest or FencingToken(0)
        if any(token >= newest for _, token in found.opened):
            raise ConflictError(f"pool {self.pool}: volume {volume} is open; it was not deleted")
        del self.shared.volumes[volume]

    async def resize(self, volume: VolumeName, capacity_bytes: int) -> VolumeInfo:
        found = await self._find(volume)
        check_growth(volume, found.info.capacity_bytes, capacity_bytes)
        self._refuse_if_full(capacity_bytes - found.info.capacity_bytes)
        found.info = msgspec.structs.replace(found.info, capacity_bytes=capacity_bytes)
        return found.info

    async def clone(
        self, volume: VolumeName, new: VolumeName, *, linked: bool = False
    ) -> VolumeInfo:
        if linked:
            raise linked_unsupported(self.name)
        info = (await self._find(volume)).info
        return await self.create(new, capacity_bytes=info.capacity_bytes, format=info.format)

    async def open(
        self, volume: VolumeName, token: FencingToken, *, read_only: bool
    ) -> BlockSource:
        found = await self._find(volume)
        if found.newest is not None and token < found.newest:
            raise FenceError(f"volume {volume} is fenced by token {found.newest}, not {token}")
        found.opened.add((self.node, token))
        return FileSource(
            path=f"/simulated/{self.pool}/{volume}", format=found.info.format, read_only=read_only
        )

    async def close(self, volume: VolumeName, token: FencingToken) -> None:
        await self._reach()
        if volume in self.shared.volumes:
            opened = self.shared.volumes[volume].opened
            opened -= {(node, old) for node, old in opened if node == self.node and old <= token}

    async def evict(self, volume: VolumeName, members: Collection[NodeName]) -> None:
        opened = (await self._find(volume)).opened
        opened -= {each for each in opened if each[0] not in members}

    async def fence(self, volume: VolumeName, token: FencingToken) -> None:
        try:
            found = await self._find(volume)
        except NotFoundError:
            raise
        except StorageError as error:
            raise FenceError(f"volume {volume}: fence {token} is unconfirmed: {error}") from error
        if token <= 0 or (found.newest is not None and token < found.newest):
            raise FenceError(f"volume {volume} is fenced by token {found.newest}, not {token}")
        found.newest = token

    async def verify(self, volume: VolumeName) -> FencingToken | None:
        return (await self._find(volume)).newest

    async def shows_opened(
        self, volume: VolumeName, node: NodeName, token: FencingToken
    ) -> bool | None:
        return (node, token) in (await self._find(volume)).opened

    def write(self, volume: VolumeName, token: FencingToken) -> None:
        """A guest on this node writes, under the token that it runs by. StorageError: refused."""
        found = self.shared.volumes.get(volume)
        newest = found.newest if found is not None else None
        old = newest is not None and token < newest
        down = found is None or self.faults.lost or self.faults.stalled
        reached = not down and not (old and self.shared.enforces)
        self.shared.writes.append(WriteRecord(self.node, volume, token, newest, reached))
        if not reached:
            raise StorageError(f"simulated: write to {volume} under token {token} was refused")

    def _used(self) -> int:
        return sum(one.info.capacity_bytes for one in self.shared.volumes.values())

    def _refuse_if_full(self, more_bytes: int) -> None:
        if more_bytes > self.shared.capacity_bytes:
            raise TooLargeError(f"pool {self.pool}: File too large")
        if self.faults.full or self._used() + more_bytes > self.shared.capacity_bytes:
            raise StorageError(f"pool {self.pool} is full")

    async def _find(self, volume: VolumeName) -> _Volume:
        check_volume_name(volume)
        await self._reach()
        found = self.shared.volumes.get(volume)
        if found is None:
            raise NotFoundError(f"pool {self.pool} has no volume {volume}")
        return found

    async def _reach(self) -> None:
        """Get through to the pool: at once, after a stall, or not at all (StorageError)."""
        deadline_s = asyncio.get_running_loop().time() + self._timeout_s
        while self.faults.stalled and not self.faults.lost:
            if asyncio.get_running_loop().time() >= deadline_s:
                raise StorageError(f"pool {self.pool}: no answer in {self._timeout_s} s")
            await asyncio.sleep(_STALL_POLL_S)
        if self.faults.lost:
            raise StorageError(f"pool {self.pool} is lost")


def _size_bytes(image: Path) -> int:
    try:
        return image.stat().st_size
    except FileNotFoundError as error:
        raise InvalidRequest(f"there is no image {image}", {"image": "an existing file"}) from error
