"""How a volume gets onto an export: made beside the others, filled, renamed when it is complete.

Copies go through this node in pieces, each a call of its own: bounded, and a cancelled one stops at
the next piece. Zeroes are left out, so that holes stay holes.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Final, TypeVar
from urllib.parse import quote

from migrator.errors import ConflictError, StorageError
from migrator.model import DiskFormat, VolumeInfo, VolumeName
from storage.bounded import bounded, run_program
from storage.copying import extents
from storage.images import image_capacity
from storage.names import capacity_below_image, check_capacity, check_volume_name
from storage.nfs import files
from storage.nfs.connection import Connection
from storage.nfs.layout import DISK_MODE, FOLDER_MODE, NOBODY_ID, UNFENCED
from storage.nfs.libnfs import Export, NfsError
from storage.settings import NfsSettings

CALL_TIMEOUT_S: Final = 12.0
PIECE_BYTES: Final = 16 * 1024 * 1024
PIECE_TIMEOUT_S: Final = 60.0
_BLOCK_BYTES: Final = 1024 * 1024
_HOLE_BYTES: Final = 65_536
_T = TypeVar("_T")


class Maker:
    """Makes volumes, by one connection."""

    def __init__(self, settings: NfsSettings, connection: Connection, qemu_img: str) -> None:
        self._settings = settings
        self._connection = connection
        self._qemu_img = qemu_img
        self._where = f"pool {settings.name}"

    async def create(
        self, volume: VolumeName, capacity_bytes: int, format: DiskFormat, image: Path | None
    ) -> None:
        """See the port. Nothing is left of what fails or is cancelled."""
        check_volume_name(volume)
        check_capacity(volume, capacity_bytes)
        image_bytes = 0
        if image is not None:
            image_bytes = await bounded(lambda: image_capacity(image, format), self._where)
            if capacity_bytes < image_bytes:
                raise capacity_below_image(volume, capacity_bytes, image_bytes)
        async with self._made(volume) as folder:
            disk = f"{folder}/disk.{format.value}"
            if image is not None:
                await self._make_disk(disk, 0)
                await self._copy_image(image, disk)
            elif format is DiskFormat.QCOW2:
                url = self._url(disk)
                await self._tool("create", "-q", "-f", "qcow2", url, str(capacity_bytes))
            else:
                await self._make_disk(disk, capacity_bytes)
            if image is not None and format is DiskFormat.RAW:
                await self._truncate(disk, capacity_bytes)
            elif image is not None and capacity_bytes > image_bytes:
                await self._tool(
                    "resize", "-q", "-f", "qcow2", self._url(disk), str(capacity_bytes)
                )
            await self._call(lambda export: _own(export, disk))

    async def clone(
        self,
        volume: VolumeName,
        new: VolumeName,
        format: DiskFormat,
        still_unwritten: Callable[[], Awaitable[None]],
    ) -> None:
        """A full copy, which `still_unwritten` may refuse when all is read."""
        check_volume_name(new)
        name = f"disk.{format.value}"
        async with self._made(new) as folder:
            await self._make_disk(f"{folder}/{name}", 0)
            source, target = f"/{volume}/{name}", f"{folder}/{name}"
            size_bytes = (await self._call(lambda export: export.status(source))).size_bytes
            for offset in range(0, size_bytes, PIECE_BYTES):
                await self._piece(partial(_copy_piece, source=source, target=target, offset=offset))
            await self._truncate(target, size_bytes)
            await still_unwritten()
            await self._call(lambda export: _own(export, target))

    async def grow(self, disk: str, present: VolumeInfo, capacity_bytes: int, owner: int) -> None:
        """To at least what it has. `owner`: the disk's, as whom qemu-img writes to it."""
        if present.format is DiskFormat.RAW:
            await self._call(lambda export: _extend(export, disk, capacity_bytes))
        elif capacity_bytes > present.capacity_bytes:
            url = self._url(disk, owner)
            await self._tool("resize", "-q", "-f", "qcow2", url, str(capacity_bytes))

    @contextlib.asynccontextmanager
    async def _made(self, volume: VolumeName) -> AsyncIterator[str]:
        """A folder that becomes the volume when the body is through, and nothing when it fails."""
        folder = files.temporary(volume)
        await self._call(lambda export: self._begin(export, volume, folder))
        try:
            yield folder
            await self._call(lambda export: self._publish(export, volume, folder))
        except BaseException:
            await asyncio.shield(self._remove(folder))
            raise

    def _begin(self, export: Export, volume: VolumeName, folder: str) -> None:
        if files.exists(export, f"/{volume}"):
            raise ConflictError(f"{self._where} has a volume {volume} already")
        export.make_folder(folder, FOLDER_MODE)
        export.chmod(folder, FOLDER_MODE)  # Whatever the umask of this process is.
        export.touch(f"{folder}/{UNFENCED.name}")
        files.remove_abandoned(export, export.status(folder).changed_at_s)

    def _publish(self, export: Export, volume: VolumeName, folder: str) -> None:
        try:
            export.rename(folder, f"/{volume}")
        except NfsError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
                raise
            raise ConflictError(f"{self._where} has a volume {volume} already") from error

    async def _remove(self, folder: str) -> None:
        """By a connection of its own: the other one may be the reason. What stays goes in a day."""
        connection = self._connection.another()
        try:
            with contextlib.suppress(StorageError):
                await connection.call(
                    lambda export: files.remove_tree(export, folder), timeout_s=CALL_TIMEOUT_S
                )
        finally:
            connection.close()

    async def _make_disk(self, disk: str, size_bytes: int) -> None:
        def work(export: Export) -> None:
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL
            with export.opened(disk, flags, DISK_MODE) as handle:
                export.truncate(handle, size_bytes)

        await self._call(work)

    async def _truncate(self, disk: str, size_bytes: int) -> None:
        def work(export: Export) -> None:
            with export.opened(disk, os.O_RDWR) as handle:
                export.truncate(handle, size_bytes)
                export.sync(handle)

        await self._call(work)

    async def _copy_image(self, image: Path, disk: str) -> None:
        pieces = await bounded(lambda: _pieces(image), self._where)
        for offset, length in pieces:
            read = partial(_read_local, image, offset, length)
            data = await bounded(read, self._where, timeout_s=PIECE_TIMEOUT_S)
            await self._piece(partial(_write_piece, disk=disk, offset=offset, data=data))
        size_bytes = await bounded(lambda: image.stat().st_size, self._where)
        await self._truncate(disk, size_bytes)

    async def _call(self, work: Callable[[Export], _T]) -> _T:
        return await self._connection.call(work, timeout_s=CALL_TIMEOUT_S)

    async def _piece(self, work: Callable[[Export], None]) -> None:
        await self._connection.call(work, timeout_s=PIECE_TIMEOUT_S)

    async def _tool(self, *arguments: str) -> None:
        await run_program(self._where, [self._qemu_img, *arguments])

    def _url(self, disk: str, user: int = 0) -> str:
        """As qemu-img takes it, which knows no other way to create."""
        server, export = self._settings.server, self._settings.export.rstrip("/")
        host = f"[{server}]" if ":" in server else server
        return f"nfs://{host}{quote(export + disk)}?uid={user}&gid={user}"


def _extend(export: Export, disk: str, size_bytes: int) -> None:
    """One request of the server's; a guest that was started meanwhile may have the file open."""
    with export.opened(disk, os.O_RDWR) as handle:
        if export.status(disk).size_bytes < size_bytes:
            export.truncate(handle, size_bytes)
        export.sync(handle)


def _own(export: Export, disk: str) -> None:
    export.chmod(disk, DISK_MODE)
    export.chown(disk, NOBODY_ID, NOBODY_ID)


def _pieces(image: Path) -> list[tuple[int, int]]:
    """The parts of an image that hold data, as (offset, length)."""
    fd = os.open(image, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return [
            (offset, min(PIECE_BYTES, end - offset))
            for start, end in extents(fd, os.fstat(fd).st_size)
            for offset in range(start, end, PIECE_BYTES)
        ]
    finally:
        os.close(fd)


def _read_local(image: Path, offset: int, length: int) -> bytes:
    with image.open("rb") as file:
        file.seek(offset)
        data = file.read(length)
    if len(data) < length:
        raise StorageError("the image became shorter while it was copied")
    return data


def _write_piece(export: Export, disk: str, offset: int, data: bytes) -> None:
    with export.opened(disk, os.O_RDWR) as handle:
        for start, block in _full_blocks(data):
            export.write(handle, offset + start, block)
        export.sync(handle)


def _copy_piece(export: Export, source: str, target: str, offset: int) -> None:
    """One piece, from the server and back."""
    end = offset + PIECE_BYTES
    with export.opened(source, os.O_RDONLY) as reading, export.opened(target, os.O_RDWR) as writing:
        while offset < end:
            data = export.read(reading, offset, min(_BLOCK_BYTES, end - offset))
            if not data:
                break
            for start, block in _full_blocks(data):
                export.write(writing, offset + start, block)
            offset += len(data)
        export.sync(writing)


def _full_blocks(data: bytes) -> Iterator[tuple[int, bytes]]:
    """What of the data isn't zero, as (offset, bytes), in runs of whole blocks."""
    start: int | None = None
    for offset in range(0, len(data), _HOLE_BYTES):
        empty = not data[offset : offset + _HOLE_BYTES].strip(b"\0")
        if empty and start is not None:
            yield start, data[start:offset]
            start = None
        elif not empty and start is None:
            start = offset
    if start is not None:
        yield start, data[start:]
