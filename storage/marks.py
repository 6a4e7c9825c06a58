"""What a pool says of itself, in files beside its volumes.

.ferry.mark      random text, one line: by it two nodes tell places apart
.ferry.owner     JSON, one line: the cluster whose pool it is (`PoolOwner`)

Whoever makes one first wins, by link(2), which is atomic on NFS too. Two files, so that an older
release, which compares the whole mark, sees the same one in a pool that has an owner.
"""

from __future__ import annotations

import contextlib
import logging
import os
import uuid
from pathlib import Path
from typing import Final

import msgspec

from migrator import durable
from migrator.errors import StorageError, words
from migrator.model import PoolOwner

MARK: Final = ".ferry.mark"
OWNER: Final = ".ferry.owner"
OWNER_BYTES_MAX: Final = 4096

_log = logging.getLogger(__name__)


def new_mark() -> str:
    """A text that nobody else has."""
    return uuid.uuid4().hex


def folder_mark(folder: Path, where: str) -> str | None:
    """The folder's, made where there is none. None: it can't be written now. For a thread."""
    mark = folder / MARK
    with contextlib.suppress(FileNotFoundError):
        return mark.read_text().strip() or None
    try:
        _make_once(mark, f"{new_mark()}\n".encode())
        return mark.read_text().strip() or None
    except OSError as error:
        _log.warning("%s: %s can't be made: %s", where, mark, words(error))
        return None


def folder_owner(
    folder: Path, where: str, claimant: PoolOwner | None, instead_of: str | None
) -> PoolOwner | None:
    """The folder's, as `VolumeDriver.owner` has it. For a thread; OSError goes up."""
    path = folder / OWNER
    found = _owner_in(path)
    if claimant is None or stays(found, claimant, instead_of):
        return found
    if found is not None:
        durable.replace(path, owner_line(claimant), mode=0o644)
        return _owner_in(path)
    try:
        _make_once(path, owner_line(claimant))
    except OSError as error:
        _log.warning("%s: %s can't be made: %s", where, path, words(error))
    return _owner_in(path)


def stays(found: PoolOwner | None, claimant: PoolOwner, instead_of: str | None) -> bool:
    """Whether what is written is left as it is."""
    if found is None:
        return False
    return found.identity == claimant.identity or found.identity != instead_of


def owner_line(owner: PoolOwner) -> bytes:
    """The file's content."""
    return msgspec.json.encode(owner) + b"\n"


def parse_owner(content: bytes, path: str) -> PoolOwner:
    """StorageError: it is no such content, and what to do about it."""
    try:
        return msgspec.json.decode(content, type=PoolOwner)
    except msgspec.DecodeError as error:
        raise StorageError(
            f"{path}, which says whose pool it is, is damaged ({error}); nothing was done. If no "
            "other cluster uses the pool, remove the file"
        ) from error


def _owner_in(path: Path) -> PoolOwner | None:
    try:
        return parse_owner(path.read_bytes(), str(path))
    except FileNotFoundError:
        return None


def _make_once(path: Path, content: bytes) -> None:
    """Make the file, whole and durable, unless it is there by now. OSError: no draft is left."""
    fresh = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        fresh.write_bytes(content)
        durable.sync(fresh)
        with contextlib.suppress(FileExistsError):
            os.link(fresh, path)
    finally:
        fresh.unlink(missing_ok=True)
