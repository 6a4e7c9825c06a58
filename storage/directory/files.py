"""A pool's folder: which file is which volume, and how each file is made, replaced and removed.

    NAME.raw or NAME.qcow2       a volume; the suffix says its format, nobody probes it
    .NAME.token                  the newest token that fenced it, in decimal
    .NAME.FORMAT.RANDOM.tmp      a volume that is being made; renamed when it is complete
    .ferry.mark                  random text: which folder this is (two nodes' may differ)
    .ferry.owner                 which cluster's pool it is
    .ferry.lock                  held (flock) while a name appears, disappears or is fenced

Volume names begin with a letter or digit, so no volume is ever hidden, and nothing hidden a
volume. Everything here is synchronous and belongs into a thread; OSError goes up.
"""

from __future__ import annotations

import contextlib
import logging
import os
import stat
import uuid
from pathlib import Path
from typing import Final

from migrator import durable
from migrator.errors import ConflictError, FenceError, NotFoundError, StorageError
from migrator.model import (
    DiskFormat,
    FencingToken,
    FileSource,
    PoolHealth,
    PoolName,
    PoolOwner,
    VolumeInfo,
    VolumeName,
)
from storage.directory.locks import image_in_use, image_written, pool_lock
from storage.marks import folder_mark, folder_owner
from storage.qcow2 import HEADER_BYTES, parse_header, read_backing_name

ABANDONED_AFTER_S: Final = 86_400.0
"""A half-made volume that nobody has written to for a day belongs to an agent that died."""

CHAIN_MAX: Final = 16
"""Linked clones of linked clones: each costs a lookup on every first read of a cluster."""

_WRITABLE: Final = 0o660
_READ_ONLY: Final = 0o440

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
        """An empty file for a volume to be. Half-made ones of dead agents are removed.

        How old those are is told by the folder's own clock: another node may be writing one, and
        this node's clock may be wrong.
        """
        temporary = self.path / f".{volume}.{format.value}.{uuid.uuid4().hex}.tmp"
        opened = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, _WRITABLE)
        try:
            now_s = os.fstat(opened).st_mtime
        finally:
            os.close(opened)
        for left in self.path.glob(".*.tmp"):
            with contextlib.suppress(FileNotFoundError):
                if now_s - left.stat().st_mtime > ABANDONED_AFTER_S:
                    left.unlink()
        return temporary

    def publish(self, temporary: Path, volume: VolumeName, format: DiskFormat) -> VolumeInfo:
        """Give a complete file its name, durably. ConflictError if somebody else took it."""
        durable.sync(temporary)
        with pool_lock(self.path):
            self.refuse_existing(volume)
            self._token_file(volume).unlink(missing_ok=True)
            temporary.rename(self.image(volume, format))
        durable.sync(self.path)
        return self._describe(volume, self.image(volume, format), format)

    def remove(self, volume: VolumeName) -> None:
        """ConflictError, and nothing removed, while a hypervisor of this host uses it."""
        with pool_lock(self.path):
            image, kind = self.find(volume)
            if image_in_use(image):
                raise ConflictError(
                    f"pool {self.pool}: a hypervisor uses volume {volume}; it was not deleted"
                )
            if self.kept_for_reading(image) and (leaning := self._leaning_on(image)):
                raise ConflictError(
                    f"pool {self.pool}: {', '.join(leaning)} lean on volume {volume}; "
                    "it was not deleted"
                )
            base = self._base_of(image) if kind is DiskFormat.QCOW2 else None
            image.unlink()
            self._token_file(volume).unlink(missing_ok=True)
            if base is not None and _is_file(base) and not self._leaning_on(base):
                base.chmod(_WRITABLE)
        durable.sync(self.path)

    def unused(self, volume: VolumeName, *, by_writers: bool = False) -> VolumeInfo:
        """The volume. ConflictError while a hypervisor of this host uses it (or writes to it).

        Unless only writers matter, also while linked clones lean on it.
        """
        image, kind = self.find(volume)
        if image_written(image) if by_writers else image_in_use(image):
            raise ConflictError(f"pool {self.pool}: a hypervisor uses volume {volume}")
        if not by_writers and self.is_base(image):
            raise ConflictError(f"pool {self.pool}: linked clones lean on volume {volume}")
        return self._describe(volume, image, kind)

    def extend(self, image: Path, capacity_bytes: int) -> None:
        """Make it at least so large: another resize may have been faster, and larger."""
        with pool_lock(self.path):
            if image.stat().st_size < capacity_bytes:
                os.truncate(image, capacity_bytes)

    def health(self) -> PoolHealth:
        """Whether the folder is there, and the file system's room."""
        if not self.path.is_dir():
            return PoolHealth(
                reachable=False, reason=f"folder {self.path} is missing: is it mounted?"
            )
        if not os.access(self.path, os.W_OK | os.X_OK):
            return PoolHealth(reachable=False, reason=f"folder {self.path} can't be written to")
        room = os.statvfs(self.path)
        return PoolHealth(
            reachable=True,
            capacity_bytes=room.f_blocks * room.f_frsize,
            free_bytes=room.f_bavail * room.f_frsize,
        )

    def mark(self) -> str | None:
        """The folder's random text, made where there is none. None: it can't be written now."""
        self._refuse_missing()
        return folder_mark(self.path, f"pool {self.pool}")

    def owner(self, claimant: PoolOwner | None, instead_of: str | None) -> PoolOwner | None:
        """As the port's."""
        self._refuse_missing()
        return folder_owner(self.path, f"pool {self.pool}", claimant, instead_of)

    def _refuse_missing(self) -> None:
        if not self.path.is_dir():
            raise StorageError(f"pool {self.pool}: folder {self.path} is missing: is it mounted?")

    # --- linked clones -----------------------------------------------------------------------

    def keep_for_reading(self, volume: VolumeName) -> None:
        """Mark a volume as the base of others: its file's write permission goes."""
        with pool_lock(self.path):
            image, _ = self.find(volume)
            image.chmod(_READ_ONLY)

    def is_base(self, image: Path) -> bool:
        """Whether others lean on it. Where none does any more, it may be written again."""
        if not self.kept_for_reading(image):
            return False
        with pool_lock(self.path):
            if self._leaning_on(image):
                return True
            image.chmod(_WRITABLE)
        return False

    def kept_for_reading(self, image: Path) -> bool:
        return not image.stat().st_mode & stat.S_IWUSR

    def source(self, image: Path, format: DiskFormat, *, read_only: bool) -> FileSource:
        """How to open an image and all that it leans on. StorageError: the chain is not sound."""
        chain = [(image, format)]
        while chain[-1][1] is DiskFormat.QCOW2 and (base := self._base_of(chain[-1][0])):
            if any(base == known for known, _ in chain) or len(chain) >= CHAIN_MAX:
                raise StorageError(
                    f"pool {self.pool}: the backing files of {image.name} are a loop, or over "
                    f"{CHAIN_MAX}"
                )
            chain.append((base, DiskFormat(base.suffix[1:])))
        found: FileSource | None = None
        for position, (path, kind) in reversed(list(enumerate(chain))):
            found = FileSource(
                path=str(path), format=kind, read_only=read_only or position > 0, backing=found
            )
        assert found is not None
        return found

    def _base_of(self, image: Path) -> Path | None:
        """The file that a qcow2 image leans on: a volume of this pool, or StorageError."""
        with image.open("rb") as file:
            header = parse_header(file.read(HEADER_BYTES))
            name = read_backing_name(file, header)
        if header.external_data:
            raise StorageError(f"pool {self.pool}: {image.name} keeps its data in another file")
        if name is None:
            return None
        base = self.path / name
        known = {f".{kind.value}" for kind in DiskFormat}
        if "/" in name or name.startswith(".") or base.suffix not in known or not _is_file(base):
            raise StorageError(
                f"pool {self.pool}: {image.name} leans on {name!r}, which is no volume of the pool"
            )
        return base

    def _leaning_on(self, base: Path) -> list[str]:
        """The names of the volumes that lean on a file."""
        found = []
        for image in sorted(self.path.glob("*.qcow2")):
            with contextlib.suppress(StorageError, OSError):
                if self._base_of(image) == base:
                    found.append(image.stem)
        return found

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
            self._write_token(volume, token)
            return True

    def _write_token(self, volume: VolumeName, token: FencingToken) -> None:
        """Also into a full pool, where a guest that is being handed over would stand still."""
        target = self._token_file(volume)
        fresh = target.with_name(f"{target.name}.{uuid.uuid4().hex}.tmp")
        text = f"{token}\n"
        try:
            fresh.write_text(text)
            fresh.rename(target)
        except BaseException as error:
            fresh.unlink(missing_ok=True)
            full = isinstance(error, OSError) and error.errno in durable.FULL
            if not full or not durable.overwrite(target, text.encode()):
                raise

    def _token_file(self, volume: VolumeName) -> Path:
        return self.path / f".{volume}.token"

    def _describe(self, volume: VolumeName, image: Path, format: DiskFormat) -> VolumeInfo:
        fd = os.open(image, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            status = os.fstat(fd)
            capacity_bytes, base = status.st_size, None
            if format is DiskFormat.QCOW2:
                header = parse_header(os.pread(fd, HEADER_BYTES, 0))
                capacity_bytes = header.capacity_bytes
                with os.fdopen(os.dup(fd), "rb") as file:
                    base = read_backing_name(file, header)
        finally:
            os.close(fd)
        return VolumeInfo(
            pool=self.pool,
            name=volume,
            format=format,
            capacity_bytes=capacity_bytes,
            allocated_bytes=status.st_blocks * 512,
            backing=None if base is None else base.rpartition(".")[0] or base,
        )


def _is_file(path: Path) -> bool:
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except FileNotFoundError:
        return False
