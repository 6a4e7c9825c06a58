"""Raw and qcow2 files in a folder that every node sees: a local disk, or a mounted share.

    create:  .NAME.raw.RANDOM.tmp ── filled, synced ──> NAME.raw      (nothing half made is visible)
    fence:   no writer on this host ── then ──> .NAME.token           (an older token is refused)

What the fence is worth: it orders the agents, all of which ask for it before they run a guest,
and it sees a writer on this host by QEMU's image lock. It can't stop a writer on another, silent
host (`fences_remote_writers` is False), so it is no ground for a takeover.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import ClassVar, Final, TypeVar

from migrator.errors import FenceError, InvalidRequest, StorageError
from migrator.model import (
    BlockSource,
    DiskFormat,
    FencingToken,
    FileSource,
    PoolName,
    VolumeInfo,
    VolumeName,
)
from migrator.ports import VolumeDriver
from storage.directory.copying import CopyCancelled, copy_image
from storage.directory.files import PoolFolder
from storage.directory.qcow2 import HEADER_BYTES, is_qcow2, parse_header
from storage.names import capacity_below_image, check_capacity, check_volume_name

CALL_TIMEOUT_S: Final = 30.0
"""For a call on a few small files. A file server that takes longer is down."""
TOOL_TIMEOUT_S: Final = 60.0
COPY_TIMEOUT_S: Final = 3600.0
GIVE_UP_WAIT_S: Final = 5.0
FENCE_WAIT_S: Final = 1.0
"""A source that is letting go of its image takes milliseconds."""
_FENCE_POLL_S: Final = 0.01

_log = logging.getLogger(__name__)
_T = TypeVar("_T")


class DirectoryPool(VolumeDriver):
    """One folder. Errors: StorageError, NotFoundError, ConflictError; InvalidRequest for names.

    A call that is cancelled or times out leaves no file of its own behind, though its thread
    may need until the file server answers.
    """

    name: ClassVar[str] = "directory"

    def __init__(
        self,
        pool: PoolName,
        path: Path,
        *,
        qemu_img: str = "qemu-img",
        copy_timeout_s: float = COPY_TIMEOUT_S,
    ) -> None:
        """`path` must exist, under the same path on every node."""
        self._pool = pool
        self._folder = PoolFolder(pool, path)
        self._qemu_img = qemu_img
        self._copy_timeout_s = copy_timeout_s

    @property
    def fences_remote_writers(self) -> bool:
        return False

    async def create(
        self,
        volume: VolumeName,
        *,
        capacity_bytes: int,
        format: DiskFormat,
        image: Path | None = None,
    ) -> VolumeInfo:
        """Create a sparse volume, as a copy of `image` where given.

        InvalidRequest: the name, the capacity, or an image that is of another format, larger
        than the capacity, or leans on other files. ConflictError: the name is taken.
        """
        check_volume_name(volume)
        check_capacity(volume, capacity_bytes)
        await self._call(lambda: self._folder.refuse_existing(volume))
        temporary = await self._call(
            lambda: self._folder.make_temporary(volume, format), undo=_remove
        )
        try:
            if image is not None:
                await self._fill_from(image, temporary, volume, capacity_bytes, format)
            elif format is DiskFormat.QCOW2:
                await self._run_tool("create", "-q", "-f", "qcow2", str(temporary), capacity_bytes)
            else:
                await self._call(lambda: os.truncate(temporary, capacity_bytes))
            return await self._call(
                lambda: self._folder.publish(temporary, volume, format),
                timeout_s=self._copy_timeout_s,
                undo=lambda _: self._folder.remove(volume),
            )
        except BaseException:
            await asyncio.shield(asyncio.to_thread(_remove, temporary))
            raise

    async def inspect(self, volume: VolumeName) -> VolumeInfo:
        check_volume_name(volume)
        return await self._call(lambda: self._folder.describe(volume))

    async def list_volumes(self) -> Sequence[VolumeInfo]:
        return await self._call(self._folder.describe_all)

    async def delete(self, volume: VolumeName) -> None:
        """Delete. ConflictError while a hypervisor of this host has the image open and active."""
        check_volume_name(volume)
        await self._call(lambda: self._folder.remove(volume))

    async def open(
        self, volume: VolumeName, token: FencingToken, *, read_only: bool
    ) -> BlockSource:
        """Where the image is. FenceError if a newer token has fenced it. Takes no resource."""
        check_volume_name(volume)

        def find() -> BlockSource:
            image, kind = self._folder.find(volume)
            newest = self._folder.token(volume)
            if newest is not None and token < newest:
                raise FenceError(
                    f"volume {volume} is fenced by token {newest}, not opened: {token}"
                )
            return FileSource(path=str(image), format=kind, read_only=read_only)

        return await self._call(find)

    async def close(self, volume: VolumeName, token: FencingToken) -> None:
        """Nothing to undo: `open` holds nothing."""

    async def fence(self, volume: VolumeName, token: FencingToken) -> None:
        """Record the token, once no hypervisor of this host writes. Waits up to 1 s for that.

        FenceError, and nothing changed: an older token, or a writer that goes on.
        """
        check_volume_name(volume)
        if token <= 0:
            raise FenceError(f"volume {volume}: {token} is no fencing token")
        loop = asyncio.get_running_loop()
        deadline_s = loop.time() + FENCE_WAIT_S
        while not await self._call(lambda: self._folder.try_fence(volume, token)):
            if loop.time() >= deadline_s:
                raise FenceError(
                    f"volume {volume}: a hypervisor of this host still writes to it after "
                    f"{FENCE_WAIT_S:.0f} s; token {token} was not set"
                )
            await asyncio.sleep(_FENCE_POLL_S)

    async def verify(self, volume: VolumeName) -> FencingToken | None:
        check_volume_name(volume)

        def read() -> FencingToken | None:
            self._folder.find(volume)
            return self._folder.token(volume)

        return await self._call(read)

    # --- parts of create ---------------------------------------------------------------------

    async def _fill_from(
        self,
        image: Path,
        temporary: Path,
        volume: VolumeName,
        capacity_bytes: int,
        format: DiskFormat,
    ) -> None:
        """Copy the image and grow it to the capacity."""
        image_bytes = await self._call(lambda: _image_capacity(image, format))
        if capacity_bytes < image_bytes:
            raise capacity_below_image(volume, capacity_bytes, image_bytes)
        given_up = threading.Event()
        await self._call(
            lambda: _copy(image, temporary, given_up),
            timeout_s=self._copy_timeout_s,
            given_up=given_up,
        )
        if format is DiskFormat.RAW:
            await self._call(lambda: os.truncate(temporary, capacity_bytes))
        elif capacity_bytes > image_bytes:
            await self._run_tool("resize", "-q", "-f", "qcow2", str(temporary), capacity_bytes)

    async def _run_tool(self, *arguments: str | int) -> None:
        """Run qemu-img to its end, bounded; it is dead when this returns or raises."""
        try:
            process = await asyncio.create_subprocess_exec(
                self._qemu_img,
                *map(str, arguments),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.DEVNULL,
                stderr=asyncio.subprocess.PIPE,
            )
        except OSError as error:
            raise StorageError(f"can't run {self._qemu_img}: {error.strerror}") from error
        try:
            async with asyncio.timeout(TOOL_TIMEOUT_S):
                _, complaint = await process.communicate()
        except TimeoutError as error:
            raise StorageError(
                f"pool {self._pool}: qemu-img {arguments[0]} took over {TOOL_TIMEOUT_S:.0f} s"
            ) from error
        finally:
            if process.returncode is None:
                process.kill()
                await asyncio.shield(process.wait())
        if process.returncode != 0:
            detail = complaint.decode(errors="replace").strip() or f"status {process.returncode}"
            raise StorageError(f"pool {self._pool}: qemu-img {arguments[0]} failed: {detail}")

    async def _call(
        self,
        work: Callable[[], _T],
        *,
        timeout_s: float = CALL_TIMEOUT_S,
        undo: Callable[[_T], None] | None = None,
        given_up: threading.Event | None = None,
    ) -> _T:
        """Run `work` in a thread, bounded; StorageError for what the file system refuses.

        Cancelled or late: `given_up` is set, and a result that comes nevertheless is undone. It
        is waited for, but not for ever: the thread may hang with its file server.
        """
        given_up = given_up or threading.Event()
        order = threading.Lock()
        results: list[_T] = []

        def run() -> _T:
            result = work()
            with order:
                results.append(result)
                late = given_up.is_set()
            if late and undo is not None:
                undo(result)
            return result

        task = asyncio.ensure_future(asyncio.to_thread(run))
        try:
            async with asyncio.timeout(timeout_s):
                return await asyncio.shield(task)
        except (asyncio.CancelledError, TimeoutError) as error:
            with order:
                in_time = list(results)
                given_up.set()
            task.add_done_callback(_log_late)
            if in_time and undo is not None:
                await asyncio.shield(asyncio.to_thread(undo, in_time[0]))
            await asyncio.wait({task}, timeout=GIVE_UP_WAIT_S)
            if isinstance(error, asyncio.CancelledError):
                raise
            raise StorageError(f"pool {self._pool}: no answer in {timeout_s:.0f} s") from error
        except OSError as error:
            raise self._explained(error) from error

    def _explained(self, error: OSError) -> StorageError:
        where = f"pool {self._pool}"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return StorageError(f"{where} is full: {error.strerror}")
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            return StorageError(f"{where}: this agent may not: {error}")
        return StorageError(f"{where}: {error}")


def _log_late(task: asyncio.Future[_T]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        _log.info("a storage call that was given up failed: %s", error)


def _remove(temporary: Path) -> None:
    with contextlib.suppress(OSError):
        temporary.unlink(missing_ok=True)


def _image_capacity(image: Path, format: DiskFormat) -> int:
    """The image's size as a guest sees it (bytes). InvalidRequest if it isn't what was said."""
    try:
        fd = os.open(image, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise InvalidRequest(f"there is no image {image}", {"image": "an existing file"}) from error
    try:
        head = os.pread(fd, HEADER_BYTES, 0)
        size_bytes = os.fstat(fd).st_size
    finally:
        os.close(fd)
    if format is DiskFormat.RAW:
        if is_qcow2(head):
            raise InvalidRequest(f"image {image} is qcow2, not raw", {"format": "qcow2"})
        return size_bytes
    try:
        header = parse_header(head)
    except StorageError as error:
        raise InvalidRequest(f"image {image}: {error}", {"image": "a qcow2 image"}) from error
    if header.backing_file or header.external_data:
        raise InvalidRequest(
            f"image {image} leans on another file: flatten it first (qemu-img convert)",
            {"image": "a qcow2 image without a backing file or external data"},
        )
    return header.capacity_bytes


def _copy(image: Path, temporary: Path, cancelled: threading.Event) -> None:
    source = os.open(image, os.O_RDONLY | os.O_CLOEXEC)
    try:
        destination = os.open(temporary, os.O_RDWR | os.O_CLOEXEC)
        try:
            with contextlib.suppress(CopyCancelled):
                copy_image(source, destination, cancelled)
        finally:
            os.close(destination)
    finally:
        os.close(source)
