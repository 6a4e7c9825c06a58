"""What the driver does on the server, call by call. Synchronous; NfsError and FerryErrors go up."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import uuid
from collections.abc import Iterator
from typing import Final

from migrator.errors import NotFoundError, StorageError
from migrator.model import DiskFormat, PoolName, PoolOwner, VolumeInfo, VolumeName
from storage.marks import (
    MARK,
    OWNER,
    OWNER_BYTES_MAX,
    new_mark,
    owner_line,
    parse_owner,
    stays,
)
from storage.nfs.layout import FOLDER_MODE, NOBODY_ID, Contents, Opening, read_contents
from storage.nfs.libnfs import Export, NfsError
from storage.qcow2 import HEADER_BYTES, parse_header

ABANDONED_AFTER_S: Final = 86_400.0
"""A half-made volume that nobody has written to for a day belongs to an agent that died."""
_MARK_BYTES_MAX: Final = 256

_log = logging.getLogger(__name__)


def contents(export: Export, pool: PoolName, volume: VolumeName) -> Contents:
    """NotFoundError: there is no such volume."""
    try:
        found = read_contents(export.names(f"/{volume}"))
    except NfsError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTDIR):
            raise
        found = None
    except StorageError as error:
        raise StorageError(f"pool {pool}: the folder of volume {volume}: {error}") from error
    if found is None:
        raise NotFoundError(f"pool {pool} has no volume {volume}")
    return found


def describe(export: Export, pool: PoolName, volume: VolumeName) -> VolumeInfo:
    """NotFoundError; StorageError for a qcow2 header that is none."""
    found = contents(export, pool, volume)
    path = f"/{volume}/{found.disk}"
    status = export.status(path)
    capacity_bytes = status.size_bytes
    if found.format is DiskFormat.QCOW2:
        with export.opened(path, os.O_RDONLY) as handle:
            header = parse_header(export.read(handle, 0, HEADER_BYTES))
        if header.backing_file or header.external_data:
            raise StorageError(f"pool {pool}: volume {volume} leans on another file")
        capacity_bytes = header.capacity_bytes
    return VolumeInfo(
        pool=pool,
        name=volume,
        format=found.format,
        capacity_bytes=capacity_bytes,
        allocated_bytes=status.used_bytes,
    )


def volumes(export: Export) -> list[str]:
    """The names of all folders that are volumes."""
    found = []
    for name in export.names("/"):
        if name.startswith("."):
            continue
        with contextlib.suppress(NfsError, StorageError):
            if read_contents(export.names(f"/{name}")) is not None:
                found.append(name)
    return found


def try_out(export: Export) -> tuple[int, int]:
    """Capacity and free bytes. StorageError where files can't be made or given away."""
    folder = temporary(VolumeName("try"))
    export.make_folder(folder, FOLDER_MODE)
    try:
        export.chown(folder, NOBODY_ID, NOBODY_ID)
        if export.status(folder).uid != NOBODY_ID:
            raise StorageError("the server ignores a change of ownership: no fence would work")
    except NfsError as error:
        if error.errno in (errno.EPERM, errno.EACCES):
            raise StorageError(
                "the server doesn't let root give files away: export it with no_root_squash"
            ) from error
        raise
    finally:
        export.remove_folder(folder)
    return export.room()


def mark(export: Export) -> str | None:
    """Which export this is: a random text, made where there is none. None: it can't be made."""
    path = f"/{MARK}"
    found = _read_small(export, path, _MARK_BYTES_MAX)
    if found is None:
        try:
            _make_once(export, path, f"{new_mark()}\n".encode())
        except NfsError as error:
            _log.warning("%s can't be made: %s", path, error)
            return None
        found = _read_small(export, path, _MARK_BYTES_MAX)
    return (found or b"").decode(errors="replace").strip() or None


def owner(
    export: Export, where: str, claimant: PoolOwner | None, instead_of: str | None
) -> PoolOwner | None:
    """As the port's."""
    path = f"/{OWNER}"
    found = _read_owner(export, where, path)
    if claimant is None or stays(found, claimant, instead_of):
        return found
    if found is not None:
        with _drafted(export, path, owner_line(claimant)) as draft:
            export.rename(draft, path)
        return _read_owner(export, where, path)
    try:
        _make_once(export, path, owner_line(claimant))
    except NfsError as error:
        _log.warning("%s: %s can't be made: %s", where, path, error)
    return _read_owner(export, where, path)


def _read_owner(export: Export, where: str, path: str) -> PoolOwner | None:
    content = _read_small(export, path, OWNER_BYTES_MAX)
    return None if content is None else parse_owner(content, f"{where}: {path}")


def _read_small(export: Export, path: str, length: int) -> bytes | None:
    """None: it isn't there."""
    try:
        with export.opened(path, os.O_RDONLY) as handle:
            return export.read(handle, 0, length)
    except NfsError as error:
        if error.errno != errno.ENOENT:
            raise
        return None


def _make_once(export: Export, path: str, content: bytes) -> None:
    """Make the file, whole and durable, unless it is there by now. NfsError: no draft is left."""
    with _drafted(export, path, content) as draft:
        try:
            export.link(draft, path)
        except NfsError as error:
            if error.errno != errno.EEXIST:
                raise


@contextlib.contextmanager
def _drafted(export: Export, path: str, content: bytes) -> Iterator[str]:
    """A file beside `path`, for the body to rename or link, and gone afterwards."""
    draft = f"{path}.{uuid.uuid4().hex}.tmp"
    try:
        with export.opened(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600) as handle:
            export.write(handle, 0, content)
            export.sync(handle)
        yield draft
    finally:
        with contextlib.suppress(NfsError):
            unlink(export, draft)


def temporary(volume: VolumeName) -> str:
    """A folder for a volume on its way in or out."""
    return f"/.{volume}.{uuid.uuid4().hex}.tmp"


def delete(export: Export, volume: VolumeName) -> Opening | None:
    """The name goes first, at once, so that nobody opens it any more; then the rest.

    Whoever has opened it just before: then it has its name again, and nothing was deleted.
    """
    gone = temporary(volume)
    export.rename(f"/{volume}", gone)
    try:
        found = read_contents(export.names(gone))
        users = [] if found is None else found.in_use()
    except BaseException:
        export.rename(gone, f"/{volume}")
        raise
    if users:
        export.rename(gone, f"/{volume}")
        return users[0]
    remove_tree(export, gone)
    return None


def remove_tree(export: Export, folder: str) -> None:
    """A volume's folder, whole or half. Idempotent."""
    try:
        names = export.names(folder)
    except NfsError as error:
        if error.errno == errno.ENOENT:
            return
        raise
    for name in names:
        unlink(export, f"{folder}/{name}")
    export.remove_folder(folder)


def remove_abandoned(export: Export, now_s: float) -> None:
    """What agents that died left half made. `now_s`: by the server's clock, as its files' times
    are; another node may be filling one, and this node's clock may be wrong."""
    for name in export.names("/"):
        if name.startswith(".") and name.endswith(".tmp"):
            with contextlib.suppress(NfsError):
                if now_s - _changed_at_s(export, f"/{name}") > ABANDONED_AFTER_S:
                    remove_tree(export, f"/{name}")


def _changed_at_s(export: Export, folder: str) -> float:
    """The folder, or what is in it: a copy that takes days changes its file alone."""
    inside = [export.status(f"{folder}/{name}").changed_at_s for name in export.names(folder)]
    return max([export.status(folder).changed_at_s, *inside])


def touch(export: Export, path: str) -> None:
    """Idempotent."""
    try:
        export.touch(path)
    except NfsError as error:
        if error.errno != errno.EEXIST:
            raise


def unlink(export: Export, path: str) -> None:
    """Idempotent."""
    try:
        export.unlink(path)
    except NfsError as error:
        if error.errno != errno.ENOENT:
            raise


def exists(export: Export, path: str) -> bool:
    try:
        export.status(path)
    except NfsError as error:
        if error.errno != errno.ENOENT:
            raise
        return False
    return True
