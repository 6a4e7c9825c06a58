"""Locks on a pool's files: ours, which orders the agents, and QEMU's, which we only look at.

QEMU holds open-file-description (OFD) locks on an image that it has active: a read lock on byte
100 + p for each permission p that it uses, and on byte 200 + p for each that it denies others
(QEMU's block/file-posix.c). p = 1 is writing. They live in one kernel: nothing is seen of a
hypervisor on another host, and nothing of one that has its images inactive (a destination before
`cont`, a source in `postmigrate`).

Everything here is synchronous and belongs into a thread.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from migrator.errors import StorageError

POOL_LOCK: Final = ".ferry.lock"
POOL_LOCK_TIMEOUT_S: Final = 5.0
"""It is held for a few file operations; longer means that the file server hangs."""

_POLL_S: Final = 0.002
_USED: Final = (100, 8)
_DENIED: Final = (200, 8)
_WRITING: Final = (101, 1)
_FLOCK: Final = struct.Struct("hhqqi4x")


@contextlib.contextmanager
def pool_lock(folder: Path) -> Iterator[None]:
    """Hold the pool's lock (flock, which NFS carries between hosts too). StorageError: no lock."""
    try:
        fd = os.open(folder / POOL_LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o660)
    except OSError as error:
        raise StorageError(f"can't open the lock of {folder}: {error.strerror}") from error
    try:
        _lock_within(fd, folder, time.monotonic() + POOL_LOCK_TIMEOUT_S)
        yield
    finally:
        os.close(fd)


def _lock_within(fd: int, folder: Path, deadline_s: float) -> None:
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError as error:
            if time.monotonic() >= deadline_s:
                raise StorageError(
                    f"the lock of {folder} was held for over {POOL_LOCK_TIMEOUT_S:.0f} s"
                ) from error
        except OSError as error:
            raise StorageError(f"can't lock {folder}: {error.strerror}") from error
        time.sleep(_POLL_S)


def image_in_use(image: Path) -> bool:
    """Whether a hypervisor of this host has the image active, even if only to read."""
    return _locked(image, (_USED, _DENIED))


def image_written(image: Path) -> bool:
    """Whether a hypervisor of this host may write to the image now."""
    return _locked(image, (_WRITING,))


def _locked(image: Path, ranges: tuple[tuple[int, int], ...]) -> bool:
    """Ask for a write lock without taking it. A file system without such locks: not locked."""
    fd = os.open(image, os.O_RDONLY | os.O_CLOEXEC)
    try:
        for start, length in ranges:
            request = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, start, length, 0)
            try:
                answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, request)
            except OSError as error:
                if error.errno in (errno.EINVAL, errno.ENOLCK, errno.EOPNOTSUPP):
                    return False
                raise
            if _FLOCK.unpack(answer)[0] != fcntl.F_UNLCK:
                return True
    finally:
        os.close(fd)
    return False
