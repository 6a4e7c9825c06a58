"""The kernel's interfaces that the engine stands on, as typed functions. No policy.

Needs Linux 6.7 (PAGEMAP_SCAN and UFFD_FEATURE_WP_ASYNC); MADV_POPULATE_WRITE needs 5.14. Numbers
are from the kernel's uapi headers, named beside each. All functions raise OSError with the
kernel's errno; what they leave behind is said where it isn't "nothing".

Dirty tracking, seen from outside the hypervisor's process: a page table entry that carries the
userfaultfd write-protect bit is clean. The kernel clears the bit by itself at the first write
(WP_ASYNC), and `pagemap_scan` finds the entries without it and sets it again, atomically.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct
from pathlib import Path
from typing import Final

import numpy as np

from migrator import ranges
from migrator.model import PAGE_SIZE_BYTES
from migrator.ranges import Ranges


def _ioc(direction: int, kind: int, number: int, size: int) -> int:
    """asm-generic/ioctl.h: direction 1 is write, 2 read, 3 both."""
    return direction << 30 | size << 16 | kind << 8 | number


# linux/userfaultfd.h
_UFFD_API: Final = 0xAA
_UFFDIO_API: Final = _ioc(3, 0xAA, 0x3F, 24)
_UFFDIO_REGISTER: Final = _ioc(3, 0xAA, 0x00, 32)
_UFFDIO_UNREGISTER: Final = _ioc(2, 0xAA, 0x01, 16)
_UFFDIO_WAKE: Final = _ioc(2, 0xAA, 0x02, 16)
_UFFDIO_COPY: Final = _ioc(3, 0xAA, 0x03, 40)
_UFFDIO_ZEROPAGE: Final = _ioc(3, 0xAA, 0x04, 32)
_UFFD_COPY_ARG: Final = struct.Struct("=QQQQq")
_UFFD_ZEROPAGE_ARG: Final = struct.Struct("=QQQq")
_UFFD_MSG_BYTES: Final = 32
_UFFD_MSG_ADDRESS: Final = 16
_UFFD_EVENT_PAGEFAULT: Final = 0x12
_FAULTS_MAX: Final = 64
"""Read at once. A thread of the hypervisor waits on one page at a time."""
_FILL_TRIES: Final = 10_000
_REGISTER_MODE_MISSING: Final = 1 << 0
_REGISTER_MODE_WP: Final = 1 << 1
_FEATURE_MISSING_HUGETLBFS: Final = 1 << 4
_FEATURE_MISSING_SHMEM: Final = 1 << 5
_FEATURE_WP_HUGETLBFS_SHMEM: Final = 1 << 12
_FEATURE_WP_UNPOPULATED: Final = 1 << 13
_FEATURE_WP_ASYNC: Final = 1 << 15
_TRACKING: Final = _FEATURE_WP_ASYNC | _FEATURE_WP_UNPOPULATED | _FEATURE_WP_HUGETLBFS_SHMEM
_POST_COPY: Final = _FEATURE_MISSING_SHMEM | _FEATURE_MISSING_HUGETLBFS
"""Not used by pre-copy, but features are chosen once in a descriptor's life."""

# linux/fs.h
_PAGEMAP_SCAN: Final = _ioc(3, ord("f"), 16, 96)
_PM_SCAN_WP_MATCHING: Final = 1 << 0
_PM_SCAN_CHECK_WPASYNC: Final = 1 << 1
_PAGE_IS_WRITTEN: Final = 1 << 1
_PAGE_IS_PRESENT: Final = 1 << 3
_PM_SCAN_ARG: Final = struct.Struct("=12Q")
_WALK_END_OFFSET: Final = 32
_SCAN_RANGES: Final = 1 << 16

# asm-generic/mman-common.h, linux/falloc.h
_MADV_POPULATE_WRITE: Final = 23
_FALLOC_FL_KEEP_SIZE: Final = 1
_FALLOC_FL_PUNCH_HOLE: Final = 2

_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]


def uffd_initialise(uffd: int) -> None:
    """Choose the descriptor's features, unless an earlier engine already did.

    UFFDIO_API succeeds once in a userfaultfd's life and then gives EINVAL, as it does for unknown
    features. The two are told apart by the descriptor's fdinfo, which shows the chosen features
    (fs/userfaultfd.c, userfaultfd_show_fdinfo). OSError(ENOTSUP): chosen without tracking.
    """
    try:
        fcntl.ioctl(uffd, _UFFDIO_API, struct.pack("=QQQ", _UFFD_API, _TRACKING | _POST_COPY, 0))
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        chosen = _uffd_features(uffd)
        if chosen & _TRACKING != _TRACKING:
            raise OSError(
                errno.ENOTSUP,
                f"the hypervisor's userfaultfd has features {chosen:#x}, which can't track writes "
                "(the kernel must be 6.7 or newer)",
            ) from error


def _uffd_features(uffd: int) -> int:
    for line in Path(f"/proc/self/fdinfo/{uffd}").read_text().splitlines():
        if line.startswith("API:"):
            return int(line.split(":")[2], 16)
    raise OSError(errno.EBADF, f"descriptor {uffd} is not a userfaultfd")


def uffd_register_wp(uffd: int, address: int, length_bytes: int) -> None:
    """Track writes to a mapping. Idempotent. Nothing is write-protected yet."""
    fcntl.ioctl(
        uffd, _UFFDIO_REGISTER, struct.pack("=QQQQ", address, length_bytes, _REGISTER_MODE_WP, 0)
    )


def uffd_unregister(uffd: int, address: int, length_bytes: int) -> None:
    """Stop tracking a mapping; the kernel clears every mark. Idempotent."""
    fcntl.ioctl(uffd, _UFFDIO_UNREGISTER, struct.pack("=QQ", address, length_bytes))


def uffd_register_missing(uffd: int, address: int, length_bytes: int) -> None:
    """From here on, whoever touches a hole of a shared mapping waits until it is filled.

    Idempotent. OSError(EBUSY) if another descriptor has the mapping.
    """
    argument = struct.pack("=QQQQ", address, length_bytes, _REGISTER_MODE_MISSING, 0)
    fcntl.ioctl(uffd, _UFFDIO_REGISTER, argument)


def uffd_wake(uffd: int, address: int, length_bytes: int) -> None:
    """Let every thread that waits in [address, address + length_bytes) look again.

    One whose page is still missing faults again: its fault can be read once more.
    """
    fcntl.ioctl(uffd, _UFFDIO_WAKE, struct.pack("=QQ", address, length_bytes))


def uffd_copy(uffd: int, address: int, source: int, length_bytes: int) -> int:
    """Fill holes with what is at our own address `source`, a page at a time, each atomically.

    Returns how many bytes were filled before it met a page that isn't a hole; 0: the first isn't.
    OSError(ESRCH or ENOENT): the process, or the registration, is gone.
    """
    argument = bytearray(_UFFD_COPY_ARG.pack(address, source, length_bytes, 0, 0))
    return _fill(uffd, _UFFDIO_COPY, argument, _UFFD_COPY_ARG.size - 8)


def uffd_zero(uffd: int, address: int, length_bytes: int) -> int:
    """Fill holes with zeros. Otherwise as `uffd_copy`."""
    argument = bytearray(_UFFD_ZEROPAGE_ARG.pack(address, length_bytes, 0, 0))
    return _fill(uffd, _UFFDIO_ZEROPAGE, argument, _UFFD_ZEROPAGE_ARG.size - 8)


def _fill(uffd: int, request: int, argument: bytearray, result_at: int) -> int:
    for _ in range(_FILL_TRIES):
        try:
            fcntl.ioctl(uffd, request, argument)
        except OSError as error:
            (done,) = struct.unpack_from("=q", argument, result_at)
            if error.errno == errno.EEXIST:
                return 0
            if error.errno != errno.EAGAIN:
                raise
            if done > 0:
                return int(done)
            continue  # The mapping is being changed.
        (done,) = struct.unpack_from("=q", argument, result_at)
        return int(done)
    raise OSError(errno.EAGAIN, "the hypervisor's mappings never rest")


def uffd_faults(uffd: int) -> list[int]:
    """The addresses (of pages) that threads have begun to wait for; [] if there are none.

    Each is told once: who reads it has to fill the page, or to wake it.
    """
    try:
        data = os.read(uffd, _FAULTS_MAX * _UFFD_MSG_BYTES)
    except BlockingIOError:
        return []
    return [
        struct.unpack_from("=Q", data, at + _UFFD_MSG_ADDRESS)[0]
        for at in range(0, len(data), _UFFD_MSG_BYTES)
        if data[at] == _UFFD_EVENT_PAGEFAULT
    ]


class PagemapScanner:
    """PAGEMAP_SCAN on one open /proc/PID/pagemap. Doesn't own the descriptor."""

    def __init__(self, pagemap_fd: int) -> None:
        self._fd = pagemap_fd
        self._found = np.zeros((_SCAN_RANGES, 3), dtype=np.uint64)  # struct page_region

    def arm(self, start: int, end: int) -> None:
        """Mark all of [start, end) clean, populated or not, and report nothing.

        Allocates page tables for what isn't populated: 0.2 % of it.
        """
        flags = _PM_SCAN_WP_MATCHING | _PM_SCAN_CHECK_WPASYNC
        while start < end:
            start, _ = self._ioctl(flags, start, end, category=0, report=False)

    def written(self, start: int, end: int) -> Ranges:
        """What was written since it was last marked clean, marked clean again, atomically.

        Addresses, as a canonical array.
        """
        flags = _PM_SCAN_WP_MATCHING | _PM_SCAN_CHECK_WPASYNC
        return self._collect(flags, start, end, _PAGE_IS_WRITTEN)

    def is_tracked(self, address: int) -> bool:
        """Whether the mapping there is registered for tracking, and not for missing pages."""
        try:
            self.peek(address, address + PAGE_SIZE_BYTES)
        except PermissionError:  # CHECK_WPASYNC's answer.
            return False
        return True

    def peek(self, start: int, end: int) -> Ranges:
        """As `written`, without marking anything."""
        return self._collect(_PM_SCAN_CHECK_WPASYNC, start, end, _PAGE_IS_WRITTEN)

    def present(self, start: int, end: int) -> Ranges:
        """What the process has mapped, without marking anything."""
        return self._collect(0, start, end, _PAGE_IS_PRESENT)

    def _collect(self, flags: int, start: int, end: int, category: int) -> Ranges:
        found: list[Ranges] = []
        while start < end:
            start, count = self._ioctl(flags, start, end, category=category, report=True)
            if count:
                found.append(self._found[:count, :2].astype(np.int64))
        return ranges.union(*found)

    def _ioctl(
        self, flags: int, start: int, end: int, *, category: int, report: bool
    ) -> tuple[int, int]:
        """One call: where it stopped, and how many ranges it found."""
        vector = (self._found.ctypes.data, len(self._found)) if report else (0, 0)
        argument = bytearray(
            _PM_SCAN_ARG.pack(
                _PM_SCAN_ARG.size, flags, start, end, 0, *vector, 0, 0, category, 0, category
            )
        )
        count = fcntl.ioctl(self._fd, _PAGEMAP_SCAN, argument)
        (walk_end,) = struct.unpack_from("=Q", argument, _WALK_END_OFFSET)
        if walk_end <= start:
            raise OSError(errno.EIO, f"PAGEMAP_SCAN made no progress at {start:#x}")
        return walk_end, count


def populated_extents(fd: int, size_bytes: int) -> Ranges:
    """What of a memory file isn't a hole. Reads nothing and populates nothing.

    hugetlbfs doesn't know holes and reports the whole file.
    """
    found: list[tuple[int, int]] = []
    offset = 0
    while offset < size_bytes:
        try:
            start = os.lseek(fd, offset, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                break
            raise
        offset = os.lseek(fd, start, os.SEEK_HOLE)
        found.append((start, min(offset, size_bytes)))
    return ranges.from_pairs(found)


def has_data(fd: int, start: int, end: int) -> bool:
    """Whether [start, end) of a memory file has a populated page."""
    try:
        return os.lseek(fd, start, os.SEEK_DATA) < end
    except OSError as error:
        if error.errno == errno.ENXIO:
            return False
        raise


def punch_hole(fd: int, start: int, end: int) -> None:
    """Make [start, end) of a memory file read as zeros and take no memory."""
    mode = _FALLOC_FL_PUNCH_HOLE | _FALLOC_FL_KEEP_SIZE
    if _libc.fallocate(fd, mode, start, end - start) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"punching [{start:#x}, {end:#x}): {os.strerror(number)}")


def populate_write(address: int, length_bytes: int) -> None:
    """Make our own mapping's pages present and writable. Runs without Python's lock."""
    if _libc.madvise(address, length_bytes, _MADV_POPULATE_WRITE) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"populating memory: {os.strerror(number)}")
