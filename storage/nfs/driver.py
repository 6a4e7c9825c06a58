"""Volumes on an NFSv3 export, used by QEMU's libnfs client and by Ferry through the same library.

    open    open.NODE.TOKEN.rw made; group := id(node, token)      both ends can write
    fence   fence.OLD -> fence.TOKEN (rename), owner and group := id(winner)
            NFSv3 checks the permission on each call: every other identity is refused from then on

The identities are uids, one for each node and token, that nobody else uses. AUTH_SYS trusts the
nodes to say theirs, so the export is for the nodes alone, and doesn't squash root. A refused writer
sees EACCES on its next write; QEMU pauses its guest.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from pathlib import Path
from typing import ClassVar, Final, TypeVar

from migrator.errors import ConflictError, FenceError, NotFoundError, StorageError
from migrator.model import (
    BlockSource,
    DiskFormat,
    Fencing,
    FencingToken,
    NfsSource,
    NodeName,
    PoolHealth,
    PoolName,
    PoolOwner,
    VolumeInfo,
    VolumeName,
)
from migrator.ports import VolumeDriver
from storage.names import check_growth, check_volume_name, linked_unsupported
from storage.nfs import files, making
from storage.nfs.connection import Connection, Server
from storage.nfs.layout import READER_ID, Contents, Fence, Opening, identity, new_identity
from storage.nfs.libnfs import Export, NfsError
from storage.settings import NfsSettings

CALL_TIMEOUT_S: Final = 12.0
"""For a few round trips. A server that takes longer is away, or hangs."""
ANSWER_TIMEOUT_S: Final = 5.0
"""For one round trip: libnfs's own limit, so that its threads end."""
HEALTH_TIMEOUT_S: Final = 4.0
FENCE_TRIES: Final = 4
"""Each lost race means that another token was set meanwhile."""

_T = TypeVar("_T")


class NfsPool(VolumeDriver):
    """One export, as one node uses it."""

    name: ClassVar[str] = "nfs"

    def __init__(
        self, settings: NfsSettings, node: NodeName, *, qemu_img: str = "qemu-img"
    ) -> None:
        self._settings = settings
        self._pool = PoolName(settings.name)
        self._node = node
        self._qemu_img = qemu_img
        self._where = f"pool {settings.name}"
        self._server = Server(settings.server, settings.export)
        self._control = Connection(self._where, self._server, self._connect)
        self._known: dict[VolumeName, Contents] = {}
        """What this node has open, so that a fence needs no look first. The server decides."""

    def _connect(self) -> Export:
        return Export(self._settings.server, self._settings.export, timeout_s=ANSWER_TIMEOUT_S)

    async def shut_down(self) -> None:
        self._control.close()

    @property
    def fencing(self) -> Fencing:
        return Fencing(
            remote_writers=True,
            method="ownership of the file: each node and token writes under a uid of its own, and "
            "the server refuses every other one on each call",
        )

    async def health(self) -> PoolHealth:
        """Also whether the server lets the nodes give files away, as the fence must."""
        async with self._connection() as connection:
            try:
                capacity, free = await connection.call(files.try_out, timeout_s=HEALTH_TIMEOUT_S)
            except StorageError as error:
                return PoolHealth(reachable=False, reason=str(error))
        return PoolHealth(reachable=True, capacity_bytes=capacity, free_bytes=free)

    async def mark(self) -> str | None:
        return await self._control.call(files.mark, timeout_s=HEALTH_TIMEOUT_S, tries=2)

    async def owner(
        self, claimant: PoolOwner | None = None, *, instead_of: str | None = None
    ) -> PoolOwner | None:
        def look(export: Export) -> PoolOwner | None:
            return files.owner(export, self._where, claimant, instead_of)

        return await self._control.call(look, timeout_s=HEALTH_TIMEOUT_S, tries=2)

    # --- volumes -----------------------------------------------------------------------------

    async def create(
        self,
        volume: VolumeName,
        *,
        capacity_bytes: int,
        format: DiskFormat,
        image: Path | None = None,
    ) -> VolumeInfo:
        async with self._connection() as connection:
            await self._maker(connection).create(volume, capacity_bytes, format, image)
            return await self._describe(connection, volume)

    async def inspect(self, volume: VolumeName) -> VolumeInfo:
        check_volume_name(volume)
        async with self._connection() as connection:
            return await self._describe(connection, volume)

    async def list_volumes(self) -> Sequence[VolumeInfo]:
        async with self._connection() as connection:
            names = await connection.call(files.volumes, timeout_s=CALL_TIMEOUT_S)
            found = []
            for name in names:
                with contextlib.suppress(NotFoundError):
                    found.append(await self._describe(connection, VolumeName(name)))
            return found

    async def delete(self, volume: VolumeName) -> None:
        """ConflictError while a node has it open, and was not shut out by a newer fence."""
        check_volume_name(volume)
        async with self._connection() as connection:
            await self._unused(connection, volume, "deleted")
            user = await connection.call(
                lambda export: files.delete(export, volume), timeout_s=CALL_TIMEOUT_S
            )
            if user is not None:
                raise self._in_use(volume, user, "deleted")
        self._known.pop(volume, None)

    async def resize(self, volume: VolumeName, capacity_bytes: int) -> VolumeInfo:
        """By qemu-img, a qcow2: as a writer with an identity of its own, given the disk first.

        A start's fence, on whichever node, takes the disk from it as from any other writer. Then:
        ConflictError; the volume has its old capacity, or the new one.
        """
        check_volume_name(volume)
        async with self._connection() as connection:
            contents = await self._unused(connection, volume, "resized")
            present = await self._describe(connection, volume)
            check_growth(volume, present.capacity_bytes, capacity_bytes)
            if capacity_bytes > present.capacity_bytes:
                await self._grow(connection, volume, contents, capacity_bytes)
            return await self._describe(connection, volume)

    async def _grow(
        self, connection: Connection, volume: VolumeName, contents: Contents, capacity_bytes: int
    ) -> None:
        own = Fence(contents.fence.token, new_identity())
        await connection.call(
            lambda export: self._give_to(export, volume, contents, own), timeout_s=CALL_TIMEOUT_S
        )
        try:
            present = await self._describe(connection, volume)  # Another may have grown it by now.
            check_growth(volume, present.capacity_bytes, capacity_bytes)
            disk = f"/{volume}/{contents.disk}"
            await self._maker(connection).grow(disk, present, capacity_bytes, own.owner)
        except StorageError as error:
            now = await connection.call(
                lambda export: self._contents(export, volume), timeout_s=CALL_TIMEOUT_S
            )
            if now.fence == own:
                raise
            raise ConflictError(
                f"{self._where}: volume {volume} was opened while it was resized, and is in "
                "another's hands now; it may be of either size"
            ) from error

    def _give_to(self, export: Export, volume: VolumeName, contents: Contents, own: Fence) -> None:
        """Give the disk to `own`, under the token that fenced it last. ConflictError: it was fenced
        since `contents` were read.
        """
        taken = ConflictError(
            f"{self._where}: volume {volume} was opened just now; it was not resized"
        )
        try:
            export.rename(f"/{volume}/{contents.fence.name}", f"/{volume}/{own.name}")
        except NfsError as error:
            if error.errno != errno.ENOENT:
                raise
            raise taken from error
        export.chown(f"/{volume}/{contents.disk}", own.owner, own.owner)
        if not files.exists(export, f"/{volume}/{own.name}"):
            self._complete(export, volume)
            raise taken

    async def clone(
        self, volume: VolumeName, new: VolumeName, *, linked: bool = False
    ) -> VolumeInfo:
        """A full copy, through this node: NFSv3 knows no other.

        ConflictError: a node has it open for writing, or something was to write to it meanwhile.
        """
        check_volume_name(volume)
        if linked:
            raise linked_unsupported(self.name)
        async with self._connection() as connection:
            before = await self._unused(connection, volume, "cloned", by_writers=True)

            async def still_unwritten() -> None:
                after = await self._unused(connection, volume, "cloned", by_writers=True)
                if after.fence != before.fence:
                    raise ConflictError(
                        f"{self._where}: volume {volume} was opened or resized while it was "
                        "copied; it was not cloned"
                    )

            maker = self._maker(connection)
            await maker.clone(volume, new, before.format, still_unwritten)
            return await self._describe(connection, new)

    # --- who may write -----------------------------------------------------------------------

    async def open(
        self, volume: VolumeName, token: FencingToken, *, read_only: bool
    ) -> BlockSource:
        check_volume_name(volume)
        opening = Opening(self._node, token, read_only)

        def work(export: Export) -> Contents:
            contents = self._contents(export, volume)
            if token < contents.fence.token:
                raise FenceError(
                    f"volume {volume} is fenced by token {contents.fence.token}, "
                    f"not opened: {token}"
                )
            if opening not in contents.openings:
                files.touch(export, f"/{volume}/{opening.name}")
            if not read_only:
                export.chown(f"/{volume}/{contents.disk}", gid=identity(self._node, token))
            return self._contents(export, volume)

        contents = await self._do(volume, work)
        self._known[volume] = contents
        user = READER_ID if read_only else identity(self._node, token)
        return NfsSource(
            server=self._settings.server,
            path=f"{self._settings.export.rstrip('/')}/{volume}/{contents.disk}",
            user=user,
            group=user,
            format=contents.format,
            read_only=read_only,
        )

    async def close(self, volume: VolumeName, token: FencingToken) -> None:
        """Also takes the group back that a destination got which never became the owner."""
        check_volume_name(volume)
        self._known.pop(volume, None)
        await self._close(volume, lambda each: each.node == self._node and each.token <= token)

    async def evict(self, volume: VolumeName, members: Collection[NodeName]) -> None:
        check_volume_name(volume)
        await self._close(volume, lambda each: each.read_only and each.node not in members)

    async def _close(self, volume: VolumeName, which: Callable[[Opening], bool]) -> None:
        def work(export: Export) -> None:
            contents = self._contents(export, volume)
            closing = [each for each in contents.openings if which(each)]
            closed = {identity(each.node, each.token) for each in closing}
            disk = f"/{volume}/{contents.disk}"
            status = export.status(disk)
            if status.gid in closed and status.uid not in closed:
                export.chown(disk, gid=status.uid)
            for each in closing:
                files.unlink(export, f"/{volume}/{each.name}")

        with contextlib.suppress(NotFoundError):
            await self._do(volume, work)

    async def fence(self, volume: VolumeName, token: FencingToken) -> None:
        check_volume_name(volume)
        if token <= 0:
            raise FenceError(f"volume {volume}: {token} is no fencing token")
        try:
            await self._do(volume, lambda export: self._fence(export, volume, token))
        except (FenceError, NotFoundError):
            raise
        except StorageError as error:
            raise FenceError(f"volume {volume}: fence {token} is unconfirmed: {error}") from error

    def _fence(self, export: Export, volume: VolumeName, token: FencingToken) -> None:
        """At most four round trips where this node has it open: rename, chown, look back."""
        known = self._known.get(volume)
        for _ in range(FENCE_TRIES):
            if known is None or token <= known.fence.token:
                known = self._contents(export, volume)
            contents, known = known, None
            if token < contents.fence.token:
                raise FenceError(
                    f"volume {volume} is fenced by token {contents.fence.token}; {token} is older "
                    "and was refused"
                )
            fence = contents.fence
            if token > fence.token:
                opened = contents.opened_by(self._node) or token
                fence = Fence(token, identity(self._node, opened))
                try:
                    export.rename(f"/{volume}/{contents.fence.name}", f"/{volume}/{fence.name}")
                except NfsError as error:
                    if error.errno == errno.ENOENT:
                        continue  # Another fence, or ours at a try whose answer was lost.
                    raise
            export.chown(f"/{volume}/{contents.disk}", fence.owner, fence.owner)
            if files.exists(export, f"/{volume}/{fence.name}"):
                self._known[volume] = Contents(contents.format, fence, contents.openings)
                return
            # A newer fence overtook us: the next turn gives the disk back to it, or refuses us.
            self._complete(export, volume)
        raise FenceError(f"volume {volume}: other fences were set all the time; {token} was not")

    def _complete(self, export: Export, volume: VolumeName) -> None:
        """Give the disk to whom the newest fence says."""
        contents = self._contents(export, volume)
        export.chown(f"/{volume}/{contents.disk}", contents.fence.owner, contents.fence.owner)

    async def verify(self, volume: VolumeName) -> FencingToken | None:
        check_volume_name(volume)
        contents = await self._do(volume, lambda export: self._contents(export, volume))
        return contents.fence.token or None

    async def shows_opened(
        self, volume: VolumeName, node: NodeName, token: FencingToken
    ) -> bool | None:
        check_volume_name(volume)
        contents = await self._do(volume, lambda export: self._contents(export, volume))
        return Opening(node, token, read_only=False) in contents.openings

    # --- parts -------------------------------------------------------------------------------

    async def _do(self, volume: VolumeName, work: Callable[[Export], _T]) -> _T:
        """On the connection that is always there. `work` may be repeated."""
        return await self._control.call(work, timeout_s=CALL_TIMEOUT_S, tries=2)

    @contextlib.asynccontextmanager
    async def _connection(self) -> AsyncIterator[Connection]:
        """One for a single operation, so that no fence waits behind a copy."""
        connection = Connection(self._where, self._server, self._connect)
        try:
            yield connection
        finally:
            connection.close()

    def _maker(self, connection: Connection) -> making.Maker:
        return making.Maker(self._settings, connection, self._qemu_img)

    def _contents(self, export: Export, volume: VolumeName) -> Contents:
        return files.contents(export, self._pool, volume)

    async def _describe(self, connection: Connection, volume: VolumeName) -> VolumeInfo:
        return await connection.call(
            lambda export: files.describe(export, self._pool, volume), timeout_s=CALL_TIMEOUT_S
        )

    async def _unused(
        self,
        connection: Connection,
        volume: VolumeName,
        what: str,
        *,
        by_writers: bool = False,
    ) -> Contents:
        contents = await connection.call(
            lambda export: self._contents(export, volume), timeout_s=CALL_TIMEOUT_S
        )
        users = [each for each in contents.in_use() if not (by_writers and each.read_only)]
        if users:
            raise self._in_use(volume, users[0], what)
        return contents

    def _in_use(self, volume: VolumeName, user: Opening, what: str) -> ConflictError:
        return ConflictError(
            f"{self._where}: node {user.node} has volume {volume} open (token {user.token}); it "
            f"was not {what}"
        )
