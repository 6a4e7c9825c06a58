"""Files that are replaced whole, and are there after a power loss: the old one, or the new one.

For state of our own. Guests' disks are their drivers' matter.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from pathlib import Path
from typing import Final

FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT})
"""The file system has no room left, or this user hasn't."""


def replace_even_if_full(path: Path, content: bytes) -> None:
    """As `replace`; where the file system is full, the old file's own blocks take the content.

    For what must be written also then, such as a fence that a guest waits for. Text that may be
    followed by blanks. Only where it is full, a power loss in that very moment may leave a mixture.
    """
    try:
        replace(path, content)
    except OSError as error:
        if error.errno not in FULL or not overwrite(path, content):
            raise


def overwrite(path: Path, content: bytes) -> bool:
    """Write over a file in place, durably, with blanks behind it up to the old file's end.

    False, and nothing was changed: it isn't there, or its blocks don't suffice. OSError.
    """
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        status = os.fstat(descriptor)
        if len(content) > status.st_blocks * 512:
            return False
        os.pwrite(descriptor, content.ljust(status.st_size), 0)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return True


def replace(path: Path, content: bytes, *, mode: int = 0o600) -> None:
    """Make `content` the file at `path`; it is durable when this returns. Blocks on the disk.

    `mode` is the new file's, less the umask. OSError: the old file is there as it was, and no draft
    of the new one is left; if only the last step failed, the new one is there, and may be lost.
    """
    draft = path.with_name(f".{path.name}.new")
    draft.unlink(missing_ok=True)  # Of a writer that died.
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    try:
        with os.fdopen(os.open(draft, flags, mode), "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)
        raise
    sync(path.parent)


def make_private(path: Path) -> None:
    """A database's file that isn't there yet: its owner's alone, and so is what SQLite puts beside
    it. OSError.
    """
    with contextlib.suppress(FileExistsError):
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        os.close(os.open(path, flags, 0o600))


def close_to_others(path: Path) -> None:
    """One that an earlier release made is read by its owner and his group at most. OSError.

    It isn't opened for that: to close it would end the locks that this process has on it.
    """
    for each in (path, path.with_name(f"{path.name}-wal"), path.with_name(f"{path.name}-shm")):
        # Another's: who shares it has seen to its mode.
        with contextlib.suppress(FileNotFoundError, PermissionError):
            mode = stat.S_IMODE(each.stat().st_mode)
            if mode & stat.S_IRWXO:
                each.chmod(mode & ~stat.S_IRWXO)


def sync(path: Path) -> None:
    """A file's content; of a folder, which files it has: made, linked, renamed, gone. OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
