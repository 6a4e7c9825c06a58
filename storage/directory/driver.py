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
import os
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from pathlib import Path
from typing import ClassVar, Final, TypeVar

from migrator.errors import ConflictError, FenceError, StorageError
from migrator.model import (
    BlockSource,
    DiskFormat,
    Fencing,
    FencingToken,
    PoolHealth,
    PoolName,
    PoolOwner,
    VolumeInfo,
    VolumeName,
)
from migrator.ports import VolumeDriver
from storage.bounded import CALL_TIMEOUT_S, COPIES, bounded, run_program, tidy
from storage.copying import CopyCancelled, copy_file
from storage.directory.files import PoolFolder
from storage.images import image_capacity
from storage.names import capacity_below_image, check_capacity, check_growth, check_volume_name

COPY_TIMEOUT_S: Final = 3600.0
HEALTH_TIMEOUT_S: Final = 3.0
FENCE_WAIT_S: Final = 1.0
"""A source that is letting go of its image takes milliseconds."""
_FENCE_POLL_S: Final = 0.01

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
    def fencing(self) -> Fencing:
        return Fencing(
            remote_writers=False,
            method="image locks: sees and refuses a second writer on the same host only; a silent "
            "node's writes can't be stopped",
        )

    async def health(self) -> PoolHealth:
        try:
            return await self._call(self._folder.health, timeout_s=HEALTH_TIMEOUT_S)
        except StorageError as error:
            return PoolHealth(reachable=False, reason=str(error))

    async def mark(self) -> str | None:
        return await self._call(self._folder.mark, timeout_s=HEALTH_TIMEOUT_S)

    async def owner(
        self, claimant: PoolOwner | None = None, *, instead_of: str | None = None
    ) -> PoolOwner | None:
        look = partial(self._folder.owner, claimant, instead_of)
        return await self._call(look, timeout_s=HEALTH_TIMEOUT_S)

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
        async with self._made(volume, format) as making:
            if image is not None:
                await self._fill_from(image, making.path, volume, capacity_bytes, format)
            elif format is DiskFormat.QCOW2:
                await self._run_tool(
                    "create", "-q", "-f", "qcow2", str(making.path), capacity_bytes
                )
            else:
                await self._call(lambda: os.truncate(making.path, capacity_bytes))
        return making.info

    async def inspect(self, volume: VolumeName) -> VolumeInfo:
        check_volume_name(volume)
        return await self._call(lambda: self._folder.describe(volume))

    async def list_volumes(self) -> Sequence[VolumeInfo]:
        return await self._call(self._folder.describe_all)

    async def delete(self, volume: VolumeName) -> None:
        """Delete. ConflictError while a hypervisor of this host has the image open and active.

        Also while a linked clone leans on it.
        """
        check_volume_name(volume)
        await self._call(lambda: self._folder.remove(volume))

    async def resize(self, volume: VolumeName, capacity_bytes: int) -> VolumeInfo:
        """Grow. ConflictError: a hypervisor of this host uses it, or a linked clone leans on it."""
        check_volume_name(volume)
        present = await self._call(lambda: self._folder.unused(volume))
        check_growth(volume, present.capacity_bytes, capacity_bytes)
        image = self._folder.image(volume, present.format)
        if present.format is DiskFormat.RAW:
            await self._call(lambda: self._folder.extend(image, capacity_bytes))
        elif capacity_bytes > present.capacity_bytes:
            await self._run_tool("resize", "-q", "-f", "qcow2", str(image), capacity_bytes)
        return await self.inspect(volume)

    async def clone(
        self, volume: VolumeName, new: VolumeName, *, linked: bool = False
    ) -> VolumeInfo:
        """A copy (shared blocks where the file system can), or a qcow2 overlay.

        An overlay's base is only read from then on: `open` refuses it to writers. ConflictError,
        for a copy: somebody has written to the volume meanwhile, a resize for one.
        """
        check_volume_name(volume)
        check_volume_name(new)
        present = await self._call(lambda: self._folder.unused(volume, by_writers=True))
        await self._call(lambda: self._folder.refuse_existing(new))
        image = self._folder.image(volume, present.format)
        kind = DiskFormat.QCOW2 if linked else present.format
        async with self._made(new, kind) as making:
            if linked:
                base = ("-b", image.name, "-F", present.format.value)
                await self._run_tool("create", "-q", "-f", "qcow2", *base, str(making.path))
                await self._call(lambda: self._folder.keep_for_reading(volume))
            else:
                before = await self._call(partial(_state_of, image))
                await self._copy(image, making.path)
                if await self._call(partial(_state_of, image)) != before:
                    raise ConflictError(
                        f"pool {self._pool}: volume {volume} was written to while it was copied; "
                        "it was not cloned"
                    )
        return making.info

    async def open(
        self, volume: VolumeName, token: FencingToken, *, read_only: bool
    ) -> BlockSource:
        """Where the image is. FenceError if a newer token has fenced it. Takes no resource.

        ConflictError: a writer, but linked clones lean on it. StorageError: its chain of backing
        files leaves the pool or is a loop.
        """
        check_volume_name(volume)

        def find() -> BlockSource:
            image, kind = self._folder.find(volume)
            newest = self._folder.token(volume)
            if newest is not None and token < newest:
                raise FenceError(
                    f"volume {volume} is fenced by token {newest}, not opened: {token}"
                )
            if not read_only and self._folder.is_base(image):
                raise ConflictError(
                    f"pool {self._pool}: linked clones lean on volume {volume}; "
                    "it can only be opened to read"
                )
            return self._folder.source(image, kind, read_only=read_only)

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

    @contextlib.asynccontextmanager
    async def _made(self, volume: VolumeName, format: DiskFormat) -> AsyncIterator[_Making]:
        """A file that becomes the volume when the body is through, and nothing when it fails."""
        temporary = await self._call(
            lambda: self._folder.make_temporary(volume, format), undo=_remove
        )
        try:
            making = _Making(temporary)
            yield making
            making.published = await self._call(
                lambda: self._folder.publish(temporary, volume, format),
                timeout_s=self._copy_timeout_s,
                undo=lambda _: self._folder.remove(volume),
                kind=COPIES,  # It syncs what was copied.
            )
        except BaseException:
            await asyncio.shield(tidy(f"pool {self._pool}", lambda: _remove(temporary)))
            raise

    async def _copy(self, image: Path, temporary: Path) -> None:
        given_up = threading.Event()
        await self._call(
            lambda: _copy(image, temporary, given_up),
            timeout_s=self._copy_timeout_s,
            given_up=given_up,
            kind=COPIES,
        )

    async def _fill_from(
        self,
        image: Path,
        temporary: Path,
        volume: VolumeName,
        capacity_bytes: int,
        format: DiskFormat,
    ) -> None:
        """Copy the image and grow it to the capacity."""
        image_bytes = await self._call(lambda: image_capacity(image, format))
        if capacity_bytes < image_bytes:
            raise capacity_below_image(volume, capacity_bytes, image_bytes)
        await self._copy(image, temporary)
        if format is DiskFormat.RAW:
            await self._call(lambda: os.truncate(temporary, capacity_bytes))
        elif capacity_bytes > image_bytes:
            await self._run_tool("resize", "-q", "-f", "qcow2", str(temporary), capacity_bytes)

    async def _run_tool(self, *arguments: str | int) -> None:
        """Run qemu-img to its end, bounded; it is dead when this returns or raises."""
        await run_program(f"pool {self._pool}", [self._qemu_img, *map(str, arguments)])

    async def _call(
        self,
        work: Callable[[], _T],
        *,
        timeout_s: float = CALL_TIMEOUT_S,
        undo: Callable[[_T], None] | None = None,
        given_up: threading.Event | None = None,
        kind: str = "",
    ) -> _T:
        """`bounded`, with the pool's name in its messages."""
        return await bounded(
            work, f"pool {self._pool}", timeout_s=timeout_s, undo=undo, given_up=given_up, kind=kind
        )


class _Making:
    """A volume on its way: the file to fill, and in the end what became of it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.published: VolumeInfo | None = None

    @property
    def info(self) -> VolumeInfo:
        assert self.published is not None
        return self.published


def _state_of(image: Path) -> tuple[int, int, int]:
    """Another one where somebody has written to it, on this host or another."""
    status = image.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns


def _remove(temporary: Path) -> None:
    with contextlib.suppress(OSError):
        temporary.unlink(missing_ok=True)


def _copy(image: Path, temporary: Path, cancelled: threading.Event) -> None:
    with contextlib.suppress(CopyCancelled):
        copy_file(image, temporary, cancelled)
