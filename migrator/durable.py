"""Files that are replaced whole, and are there after a power loss: the old one, or the new one.

For state of our own. Guests' disks are their drivers' matter.
"""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path


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
