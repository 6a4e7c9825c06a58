"""Copying an image: shared blocks where the file system can, inside the kernel where it can.

    FICLONE (btrfs, XFS: instant) ── can't ──> copy_file_range, extent by extent ── can't ──>
    read and write, extent by extent

Holes stay holes. The copy stops between chunks when `cancelled` is set. Synchronous: for a thread.
"""

from __future__ import annotations

import errno
import fcntl
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from migrator.errors import StorageError

CHUNK_BYTES: Final = 8 * 1024 * 1024
"""Between two looks at `cancelled`: under 0.1 s on a slow disk."""

_FICLONE: Final = 0x40049409
_CANT: Final = frozenset(
    {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTTY, errno.EBADF}
)


class CopyCancelled(Exception):
    """The copy was given up by its owner."""


def copy_file(source: Path, destination: Path, cancelled: threading.Event) -> None:
    """`copy_image`, of files that are there."""
    with source.open("rb", buffering=0) as image, destination.open("r+b", buffering=0) as copy:
        copy_image(image.fileno(), copy.fileno(), cancelled)


def copy_image(source: int, destination: int, cancelled: threading.Event) -> None:
    """Make the file `destination` (empty, writable) equal to `source`. OSError, CopyCancelled."""
    try:
        fcntl.ioctl(destination, _FICLONE, source)
        return
    except OSError as error:
        if error.errno not in _CANT and error.errno != errno.EPERM:
            raise
    size_bytes = os.fstat(source).st_size
    os.ftruncate(destination, size_bytes)
    in_kernel = True
    for start, end in extents(source, size_bytes):
        offset = start
        while offset < end:
            if cancelled.is_set():
                raise CopyCancelled
            want = min(CHUNK_BYTES, end - offset)
            copied = _in_kernel(source, destination, offset, want) if in_kernel else None
            if copied is None:
                in_kernel = False
                copied = _by_hand(source, destination, offset, want)
            if copied == 0:
                raise StorageError("the image became shorter while it was copied")
            offset += copied


def extents(fd: int, size_bytes: int) -> Iterator[tuple[int, int]]:
    """The parts of a file that hold data. All of it, where holes can't be asked for."""
    offset = 0
    while offset < size_bytes:
        try:
            start = os.lseek(fd, offset, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return
            if error.errno not in _CANT:
                raise
            yield offset, size_bytes
            return
        offset = os.lseek(fd, start, os.SEEK_HOLE)
        yield start, offset


def _in_kernel(source: int, destination: int, offset: int, length: int) -> int | None:
    try:
        return os.copy_file_range(source, destination, length, offset, offset)
    except OSError as error:
        if error.errno in _CANT:
            return None
        raise


def _by_hand(source: int, destination: int, offset: int, length: int) -> int:
    data = os.pread(source, length, offset)
    written = 0
    while written < len(data):
        written += os.pwrite(destination, data[written:], offset + written)
    return written
