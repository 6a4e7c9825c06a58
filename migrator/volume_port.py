"""The storage's port: volumes, and who may write to them. The rules of `ports` hold here, too."""

from __future__ import annotations

import abc
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import ClassVar

from migrator.model import (
    BlockSource,
    DiskFormat,
    Fencing,
    FencingToken,
    NodeName,
    PoolHealth,
    PoolOwner,
    VolumeInfo,
    VolumeName,
)


class VolumeDriver(abc.ABC):
    """One node's view of one pool. Errors: StorageError, NotFoundError, ConflictError.

    InvalidRequest names the wrong field: a name that leaves the pool, a size, an image.

    Who may write. `open` gives each (node, token) an identity of its own at the storage, where it
    can: a uid, an initiator name, a reservation key, an export. `fence(volume, token)`, called on
    the winner's node, leaves the writing to **what this node has opened last, whatever token it
    was opened under**, and shuts out everybody else, whatever token they have:

        start      a.open(1)  a.fence(1)                           a writes
        handoff    b.open(2)  b.fence(2)                           b writes, a doesn't
        rollback   b.open(2)  a.fence(2)                           a writes, b doesn't
        give-back  b.open(2)  b.fence(2)  a.fence(3)               a writes again, b doesn't

    In a rollback the source's hypervisor still is what was opened under the old token. What a node
    has opened must be known after its agent's restart too.
    """

    name: ClassVar[str]
    makes_at_once: ClassVar[bool] = True
    """A volume that is being made isn't there before it is whole, whatever dies meanwhile."""

    @abc.abstractmethod
    async def create(
        self,
        volume: VolumeName,
        *,
        capacity_bytes: int,
        format: DiskFormat,
        image: Path | None = None,
    ) -> VolumeInfo:
        """Create a volume, as a copy of `image` (same format, grown to capacity) where given.

        ConflictError if it exists. On failure nothing is left.
        """

    @abc.abstractmethod
    async def inspect(self, volume: VolumeName) -> VolumeInfo: ...

    @abc.abstractmethod
    async def list_volumes(self) -> Sequence[VolumeInfo]: ...

    @abc.abstractmethod
    async def delete(self, volume: VolumeName) -> None:
        """Delete; NotFoundError if it isn't there. ConflictError while it is seen to be in use."""

    @abc.abstractmethod
    async def resize(self, volume: VolumeName, capacity_bytes: int) -> VolumeInfo:
        """Grow a volume that no hypervisor uses. InvalidRequest if it would shrink.

        The caller sees to it that no domain has it open; ConflictError where the driver sees one.
        """

    @abc.abstractmethod
    async def clone(
        self, volume: VolumeName, new: VolumeName, *, linked: bool = False
    ) -> VolumeInfo:
        """Make `new` with what `volume` holds. On failure nothing is left.

        `linked`: a qcow2 overlay that leans on `volume`, which from then on is only read.
        InvalidRequest where the driver can't. The caller sees to it that nobody writes meanwhile.
        """

    @abc.abstractmethod
    async def health(self) -> PoolHealth:
        """Try the storage. Never raises; bounded by a few seconds, also with a hung server."""

    @property
    @abc.abstractmethod
    def fencing(self) -> Fencing:
        """What `fence` can do on this pool."""

    @property
    def fences_remote_writers(self) -> bool:
        """Whether `fence` stops a writer on another, silent node. HA takeover needs it."""
        return self.fencing.remote_writers

    @abc.abstractmethod
    async def open(
        self, volume: VolumeName, token: FencingToken, *, read_only: bool
    ) -> BlockSource:
        """Make the volume usable by this node's hypervisor under `token`. Idempotent.

        During a migration both ends have it open; only the newest token may write.
        """

    @abc.abstractmethod
    async def close(self, volume: VolumeName, token: FencingToken) -> None:
        """Undo `open`, of this token or an older one. Idempotent.

        After a rollback the token is newer than the one that the volume was opened under.
        """

    async def evict(self, volume: VolumeName, members: Collection[NodeName]) -> None:  # noqa: B027
        """Close what any other node has open to read: those were removed, and will never do it.

        Writers are the fence's matter. For a volume that no domain runs with. Idempotent. Where a
        driver doesn't know who has it open there is nothing to do.
        """

    @abc.abstractmethod
    async def fence(self, volume: VolumeName, token: FencingToken) -> None:
        """Shut out every writer but this node's (see the class). FenceError if unconfirmed.

        Idempotent: repeating the newest token, on any node, completes that fence and changes
        nothing else. A token older than one that already fenced raises FenceError and changes
        nothing. It is part of the blackout: no more round trips than it must have.
        """

    @abc.abstractmethod
    async def verify(self, volume: VolumeName) -> FencingToken | None:
        """The newest token that fenced this volume; None if none did."""

    async def mark(self) -> str | None:
        """What only this storage answers with; another one behind the same settings doesn't.

        Nodes compare it before a guest goes from one to the other. None: the settings say it all.
        """
        return None

    async def owner(
        self, claimant: PoolOwner | None = None, *, instead_of: str | None = None
    ) -> PoolOwner | None:
        """Which cluster's pool this is, as the storage itself has it written down.

        `claimant`: written down where nobody is, and in the place of the cluster whose identity is
        `instead_of`; never in the place of another one. Idempotent. None: nobody is, or it can't
        be written down there (a device has no place for it; a folder is full). StorageError: it
        can't be read, or couldn't be replaced.
        """
        return None

    async def identity(self, volume: VolumeName) -> str | None:
        """What names the volume's device, from whichever node and by whichever way it is seen.

        Nodes compare it as they do the mark. None: the device has no such name.
        """
        return None

    async def reach(self, volume: VolumeName) -> None:
        """Whether what this node's hypervisor needs of the volume answers now.

        StorageError: in words, why not. Changes nothing; a few round trips.
        """
        await self.verify(volume)

    async def shows_opened(
        self, volume: VolumeName, node: NodeName, token: FencingToken
    ) -> bool | None:
        """Whether the storage knows here that `node` has opened it for writing under `token`.

        Asked on another node, when it has: False means that the two have different storage behind
        one name. None: this storage can't tell. StorageError: it can't now.
        """
        return None

    async def shut_down(self) -> None:  # noqa: B027 - Most drivers have nothing to let go of.
        """Let go of the driver's own threads and connections. What is open stays open."""
