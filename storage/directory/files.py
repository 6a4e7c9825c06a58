"""A pool's folder: which file is which volume, and how each file is made, replaced and removed.

    NAME.raw or NAME.qcow2       a volume; the suffix says its format, nobody probes it
    .NAME.token                  the newest token that fenced it, in decimal
    .NAME.FORMAT.RANDOM.tmp      a volume that is being made; renamed when it is complete
    .ferry.lock                  held (flock) while a name appears, disappears or is fenced

Volume names begin with a letter or digit, so no volume is ever hidden, and nothing hidden a
volume. Everything here is synchronous and belongs into a thread; OSError goes up.
"""

from __future__ import annotations

import contextlib
import logging
import os
import stat
import time
import uuid
from pathlib import Path
from typing import Final

from migrator.errors import ConflictError, FenceError, NotFoundError, StorageError
from migrator.model import DiskFormat, FencingToken, PoolName, VolumeInfo, VolumeName
from storage.directory.locks import image_in_use, image_written, pool_lock
from storage.directory.qcow2 import HEADER_BYTES, parse_header

ABANDONED_AFTER_S: Final = 86_400.0
"""A half-made volume that nobody has written to for a day belongs to an agent that died."""

_log = logging.getLogger(__name__)


class PoolFolder:
    """The files of one pool."""

    def __init__(self, pool: PoolName, path: Path) -> None:
        self.pool = pool
        self.path = path

    def image(self, volume: VolumeName, format: DiskFormat) -> Path:
        return self.path / f"{volume}.{format.value}"

    def find(self, volume: VolumeName) -> tuple[Path, DiskFormat]:
        """The volume's file and format. NotFoundError."""
        for kind in DiskFormat:
            image = self.image(volume, kind)
            if _is_file(image):
                return image, kind
        if not self.path.is_dir():
            raise StorageError(f"pool {self.pool}: folder {self.path} is missing: is it mounted?")
        raise NotFoundError(f"pool {self.pool} has no volume {volume}")

    def refuse_existing(self, volume: VolumeName) -> None:
        """ConflictError if the name is taken, in whatever format."""
        if any(os.path.lexists(self.image(volume, kind)) for kind in DiskFormat):
            raise ConflictError(f"pool {self.pool} has a volume {volume} already")

    def describe(self, volume: VolumeName) -> VolumeInfo:
        image, kind = self.find(volume)
        return self._describe(volume, image, kind)

    def describe_all(self) -> list[VolumeInfo]:
        """Every volume, by name. One that can't be read is logged and left out."""
        found: list[VolumeInfo] = []
        for image in sorted(self.path.iterdir()):
            volume, _, suffix = image.name.rpartition(".")
            if image.name.startswith(".") or suffix not in set(DiskFormat) or not _is_file(image):
                continue
            try:
                found.append(self._describe(VolumeName(volume), image, DiskFormat(suffix)))
            except FileNotFoundError:
                continue
            except (StorageError, OSError) as error:
                _log.warning("pool %s: %s is left out: %s", self.pool, image.name, error)
        return found

    def make_temporary(self, volume: VolumeName, format: DiskFormat) -> Path:
        """An empty file for a volume to be. Half-made ones of dead agents are removed first."""
        for left in self.path.glob(".*.tmp"):
            with contextlib.suppress(FileNotFoundError):
                if time.time() - left.stat().st_mtime > ABANDONED_AFTER_S:
                    left.unlink()
        temporary = self.path / f".{volume}.{format.value}.{uuid.uuid4().hex}.tmp"
        os.close(os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o660))
        return temporary

    def publish(self, temporary: Path, volume: VolumeName, format: DiskFormat) -> VolumeInfo:
        """Give a complete file its name, durably. ConflictError if somebody else took it."""
        _sync(temporary)
        with pool_lock(self.path):
            self.refuse_existing(volume)
            self._token_file(volume).unlink(missing_ok=True)
            temporary.rename(self.image(volume, format))
        _sync(self.path)
        return self._describe(volume, self.image(volume, format), format)

    def remove(self, volume: VolumeName) -> None:
        """ConflictError, and nothing removed, while a hypervisor of this host uses it."""
        with pool_lock(self.path):
            image, _ = self.find(volume)
            if image_in_use(image):
                raise ConflictError(
                    f"pool {self.pool}: a hypervisor uses volume {volume}; it was not deleted"
                )
            image.unlink()
            self._token_file(volume).unlink(missing_ok=True)
        _sync(self.path)

    def token(self, volume: VolumeName) -> FencingToken | None:
        """The newest token that fenced the volume. Empty after a power loss: as if none had."""
        try:
            text = self._token_file(volume).read_text().strip()
        except FileNotFoundError:
            return None
        if not text:
            return None
        if not text.isdecimal():
            raise StorageError(f"pool {self.pool}: the token of volume {volume} is unreadable")
        return FencingToken(int(text))

    def try_fence(self, volume: VolumeName, token: FencingToken) -> bool:
        """Record the token if nobody of this host writes. False, and no change: somebody does.

        FenceError for an older token than the newest. A repeated one needs no second look at
        the writers: by then its own owner may be one.

        The record isn't forced to the disk: that costs milliseconds of the blackout, and a power
        loss ends the writers of this host, the only ones that this fence is about.
        """
        with pool_lock(self.path):
            image, _ = self.find(volume)
            newest = self.token(volume)
            if newest is not None and token < newest:
                raise FenceError(
                    f"volume {volume} is fenced by token {newest}; {token} is older and was refused"
                )
            if token == newest:
                return True
            if image_written(image):
                return False
            target = self._token_file(volume)
            fresh = target.with_name(f"{target.name}.{uuid.uuid4().hex}.tmp")
            try:
                fresh.write_text(f"{token}\n")
                fresh.rename(target)
            except BaseException:
                fresh.unlink(missing_ok=True)
                raise
            return True

    def _token_file(self, volume: VolumeName) -> Path:
        return self.path / f".{volume}.token"

    def _describe(self, volume: VolumeName, image: Path, format: DiskFormat) -> VolumeInfo:
        fd = os.open(image, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            status = os.fstat(fd)
            capacity_bytes = status.st_size
            if format is DiskFormat.QCOW2:
                capacity_bytes = parse_header(os.pread(fd, HEADER_BYTES, 0)).capacity_bytes
        finally:
            os.close(fd)
        return VolumeInfo(
            pool=self.pool,
            name=volume,
            format=format,
            capacity_bytes=capacity_bytes,
            allocated_bytes=status.st_blocks * 512,
        )


def _is_file(path: Path) -> bool:
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except FileNotFoundError:
        return False


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
