"""Block devices that every node sees: Fibre Channel, multipath, clustered LVM; loop in the lab.

A volume is a device in one folder, under the same name on each node. Ferry makes none: a hook does,
or the site did. What fences is a hook, too (persistent reservations of the node, as a rule: see
deploy/samples/block-fence). A reservation there belongs to the node's path to the device, not to a
process; so the winner's node registers and preempts in one go, and nothing is prepared at `open`.

Without a fence hook the fence is only this node's memory of the newest token: it keeps this node
from going back behind it, and stops nobody. The pool says so, and takeover is refused.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import stat
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Final, TypeVar

import msgspec

from migrator.errors import (
    ConflictError,
    FenceError,
    FerryError,
    InvalidRequest,
    NotFoundError,
    StorageError,
)
from migrator.model import (
    BlockDeviceSource,
    BlockSource,
    DiskFormat,
    Fencing,
    FencingToken,
    NodeName,
    PoolHealth,
    PoolName,
    VolumeInfo,
    VolumeName,
)
from migrator.ports import VolumeDriver
from storage import raw_only
from storage.block.identity import device_identity
from storage.block.tokens import TokenFolder
from storage.bounded import bounded, run_program
from storage.half_made import made
from storage.holder_keys import key_of
from storage.hooks import call_hook
from storage.names import (
    check_growth,
    check_volume_name,
)
from storage.settings import BlockSettings

HOOK_TIMEOUT_S: Final = 60.0
FENCE_TIMEOUT_S: Final = 10.0
HEALTH_TIMEOUT_S: Final = 3.0
COPY_TIMEOUT_S: Final = 3600.0
_CONVERT: Final = ("qemu-img", "convert", "-n", "-t", "none", "-f", "raw", "-O", "raw")
_BLKGETSIZE64: Final = 0x80081272
_T = TypeVar("_T")
_APPEARS_S: Final = 10.0
"""How long a new device may take to be seen (udev)."""


class _Answer(msgspec.Struct, frozen=True, kw_only=True):
    """Of a hook that has nothing to say."""


class _Token(msgspec.Struct, frozen=True, kw_only=True):
    token: int | None = None


class BlockPool(VolumeDriver):
    """One node's view of the devices. Errors as of the port."""

    name: ClassVar[str] = "block"
    makes_at_once: ClassVar[bool] = False

    def __init__(
        self,
        pool: PoolName,
        node: NodeName,
        folder: Path,
        state_directory: Path,
        *,
        hook: Sequence[str] | None = None,
        fence_hook: Sequence[str] | None = None,
    ) -> None:
        """`state_directory`: where this node notes tokens if no hook fences."""
        self._pool = pool
        self._node = node
        self._folder = folder
        self._hook = hook
        self._fence_hook = fence_hook
        self._tokens = TokenFolder(state_directory / "block" / pool)

    @property
    def fencing(self) -> Fencing:
        if self._fence_hook is None:
            return Fencing(
                remote_writers=False,
                method="none: without a fence_hook nothing stops a writer on another node; see "
                "deploy/samples/block-fence",
            )
        return Fencing(
            remote_writers=True, method=f"the hook {self._fence_hook[0]} fences the device"
        )

    async def health(self) -> PoolHealth:
        try:
            await self._bounded(lambda: sorted(self._folder.iterdir()), timeout_s=HEALTH_TIMEOUT_S)
        except FerryError as error:
            return PoolHealth(reachable=False, reason=str(error))
        return PoolHealth(reachable=True)

    # --- volumes ---

    async def create(
        self,
        volume: VolumeName,
        *,
        capacity_bytes: int,
        format: DiskFormat,
        image: Path | None = None,
    ) -> VolumeInfo:
        """By the hook; raw only. InvalidRequest where there is no hook."""
        await raw_only.check_new(
            f"pool {self._pool}",
            volume,
            capacity_bytes=capacity_bytes,
            format=format,
            image=image,
            why_raw="a device's bytes are the disk's",
        )
        await self._make(volume, capacity_bytes, image)
        return await self.inspect(volume)

    async def clone(
        self, volume: VolumeName, new: VolumeName, *, linked: bool = False
    ) -> VolumeInfo:
        raw_only.check_clone(self.name, volume, new, linked=linked)
        source = await self.inspect(volume)
        await self._make(new, source.capacity_bytes, self._device(volume))
        return await self.inspect(new)

    async def _make(self, volume: VolumeName, capacity_bytes: int, content: Path | None) -> None:
        """A device with what `content` holds; gone again if that fails or is cancelled."""
        if await self._bounded(lambda: os.path.lexists(self._device(volume))):
            raise ConflictError(f"pool {self._pool} has a volume {volume} already")
        async with made(
            self._ask("create", _Answer, volume=volume, capacity_bytes=capacity_bytes),
            lambda: self._ask("delete", _Answer, volume=volume),
            f"pool {self._pool}: device {volume}",
        ):
            await self._wait_for(volume)
            if content is not None:
                await run_program(
                    f"pool {self._pool}",
                    [*_CONVERT, str(content), str(self._device(volume))],
                    timeout_s=COPY_TIMEOUT_S,
                )

    async def _wait_for(self, volume: VolumeName) -> None:
        """Until the device node is there: udev makes it some time after the hook has ended."""
        deadline = asyncio.get_running_loop().time() + _APPEARS_S
        while True:
            try:
                await self.inspect(volume)
                return
            except NotFoundError:
                if asyncio.get_running_loop().time() > deadline:
                    raise
                await asyncio.sleep(0.05)

    async def inspect(self, volume: VolumeName) -> VolumeInfo:
        check_volume_name(volume)
        return await self._bounded(lambda: self._describe(volume))

    async def list_volumes(self) -> Sequence[VolumeInfo]:
        return await self._bounded(self._describe_all)

    async def resize(self, volume: VolumeName, capacity_bytes: int) -> VolumeInfo:
        """By the hook."""
        present = await self.inspect(volume)
        check_growth(volume, present.capacity_bytes, capacity_bytes)
        if capacity_bytes > present.capacity_bytes:
            await self._ask("resize", _Answer, volume=volume, capacity_bytes=capacity_bytes)
        return await self.inspect(volume)

    async def delete(self, volume: VolumeName) -> None:
        """By the hook."""
        await self.inspect(volume)
        await self._ask("delete", _Answer, volume=volume)
        await self._bounded(lambda: self._tokens.forget(volume))

    # --- who may write ---

    async def open(
        self, volume: VolumeName, token: FencingToken, *, read_only: bool
    ) -> BlockSource:
        """FenceError if a newer token has fenced. Takes no resource."""
        await self.inspect(volume)
        newest = await self.verify(volume)
        if newest is not None and token < newest:
            raise FenceError(f"volume {volume} is fenced by token {newest}, not opened: {token}")
        return BlockDeviceSource(
            path=str(self._device(volume)), format=DiskFormat.RAW, read_only=read_only
        )

    async def close(self, volume: VolumeName, token: FencingToken) -> None:
        """Nothing to undo: `open` holds nothing."""

    async def fence(self, volume: VolumeName, token: FencingToken) -> None:
        await self.inspect(volume)
        key = key_of(self._node, token)
        if self._fence_hook is None:
            await self._bounded(lambda: self._tokens.raise_to(volume, token))
            return
        request = {
            "operation": "fence",
            "device": str(self._device(volume)),
            "node": self._node,
            "token": token,
            "key": f"{key.value:#x}",
        }
        try:
            await call_hook(self._fence_hook, request, _Answer, timeout_s=FENCE_TIMEOUT_S)
        except (FenceError, ConflictError, NotFoundError):
            raise
        except StorageError as error:
            raise FenceError(f"volume {volume}: fence {token} is unconfirmed: {error}") from error

    async def verify(self, volume: VolumeName) -> FencingToken | None:
        await self.inspect(volume)
        if self._fence_hook is None:
            return await self._bounded(lambda: self._tokens.read(volume))
        request = {"operation": "token", "device": str(self._device(volume)), "node": self._node}
        found = await call_hook(self._fence_hook, request, _Token, timeout_s=FENCE_TIMEOUT_S)
        return None if not found.token else FencingToken(found.token)

    async def identity(self, volume: VolumeName) -> str | None:
        await self.inspect(volume)
        return await self._bounded(lambda: device_identity(self._device(volume)))

    # --- parts ---

    async def _ask(self, operation: str, answer: type[_T], **fields: Any) -> _T:
        if self._hook is None:
            reason = f"pool {self._pool} has no hook that could {operation} a device"
            raise InvalidRequest(
                f"{reason}; nothing was done", {"hook": "in the pool's settings, or do it yourself"}
            )
        device = str(self._device(VolumeName(fields["volume"])))
        request: Mapping[str, Any] = {"operation": operation, "device": device, **fields}
        return await call_hook(self._hook, request, answer, timeout_s=HOOK_TIMEOUT_S)

    async def _bounded(self, work: Callable[[], _T], *, timeout_s: float = 10.0) -> _T:
        return await bounded(work, f"pool {self._pool}", timeout_s=timeout_s)

    def _device(self, volume: VolumeName) -> Path:
        return self._folder / volume

    def _describe(self, volume: VolumeName) -> VolumeInfo:
        path = self._device(volume)
        try:
            # Not blocking: a pipe of that name would wait.
            device = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except FileNotFoundError as error:
            raise NotFoundError(f"pool {self._pool} has no volume {volume}") from error
        try:
            if not stat.S_ISBLK(os.fstat(device).st_mode):
                raise StorageError(f"{path} is no block device")
            size = bytearray(8)
            fcntl.ioctl(device, _BLKGETSIZE64, size)
        finally:
            os.close(device)
        (capacity_bytes,) = struct.unpack("=Q", size)
        return VolumeInfo(
            pool=self._pool,
            name=volume,
            format=DiskFormat.RAW,
            capacity_bytes=capacity_bytes,
            allocated_bytes=capacity_bytes,
        )

    def _describe_all(self) -> list[VolumeInfo]:
        found = []
        for path in sorted(self._folder.iterdir()):
            volume = VolumeName(path.name)
            try:
                check_volume_name(volume)
                found.append(self._describe(volume))
            except (FerryError, OSError):
                continue  # What can't be a volume, or went away.
        return found


def make_block_pool(settings: BlockSettings, node: NodeName, state_directory: Path) -> BlockPool:
    """From its settings. No I/O."""
    return BlockPool(
        PoolName(settings.name),
        node,
        Path(settings.path),
        state_directory,
        hook=None if settings.hook is None else [settings.hook],
        fence_hook=None if settings.fence_hook is None else [settings.fence_hook],
    )
