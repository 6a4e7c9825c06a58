"""Whether this host's kernel can do what the page engine and KVM need: by trying it.

All functions block for some microseconds; call them off the event loop.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import platform
import struct
from pathlib import Path

SHIM = Path(__file__).with_name("uffd_shim.so")

_SYS_USERFAULTFD = {"x86_64": 323, "aarch64": 282}
_UFFD_API = 0xAA
_UFFDIO_API = 0xC018AA3F
_PAGEMAP_SCAN = 0xC0606610
_PAGE_IS_PRESENT = 1 << 3
_FEATURES = {
    "MISSING_SHMEM": 1 << 5,
    "WP_HUGETLBFS_SHMEM": 1 << 12,
    "WP_UNPOPULATED": 1 << 13,
    "WP_ASYNC": 1 << 15,
}
"""linux/userfaultfd.h; WP_ASYNC and PAGEMAP_SCAN came with Linux 6.7."""

_libc = ctypes.CDLL(None, use_errno=True)


def paged_engine_obstacle() -> str | None:
    """Why the page engine can't work on this host; None if it can."""
    if not SHIM.exists():
        return f"the shim {SHIM.name} was not built"
    return _userfaultfd_obstacle() or _pagemap_scan_obstacle()


def _userfaultfd_obstacle() -> str | None:
    number = _SYS_USERFAULTFD.get(platform.machine())
    if number is None:
        return f"userfaultfd is not known on {platform.machine()}"
    uffd = int(_libc.syscall(number, os.O_CLOEXEC | os.O_NONBLOCK))
    if uffd < 0:
        return f"userfaultfd(2) failed: {os.strerror(ctypes.get_errno())}"
    try:
        answer = bytearray(struct.pack("QQQ", _UFFD_API, 0, 0))
        fcntl.ioctl(uffd, _UFFDIO_API, answer)
        features = struct.unpack("QQQ", answer)[1]
    except OSError as error:
        return f"UFFDIO_API failed: {error.strerror}"
    finally:
        os.close(uffd)
    missing = [name for name, bit in _FEATURES.items() if not features & bit]
    if missing:
        return f"the kernel's userfaultfd lacks {', '.join(missing)} (Linux 6.7 or later has them)"
    return None


def _pagemap_scan_obstacle() -> str | None:
    """Ask for an empty range of our own memory: an old kernel answers ENOTTY."""
    with mmap.mmap(-1, mmap.PAGESIZE) as page:
        anchor = ctypes.c_char.from_buffer(page)
        address = ctypes.addressof(anchor)
        vector = ctypes.create_string_buffer(24)
        request = bytearray(
            struct.pack(
                "12Q",
                *(96, 0, address, address + mmap.PAGESIZE, 0),
                *(ctypes.addressof(vector), 1, 0, 0, 2, 0, 2),
            )
        )
        try:
            descriptor = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            return f"/proc/self/pagemap can't be opened: {error.strerror}"
        try:
            fcntl.ioctl(descriptor, _PAGEMAP_SCAN, request)
        except OSError as error:
            if error.errno == errno.ENOTTY:
                return "the kernel has no PAGEMAP_SCAN (Linux 6.7 or later has it)"
            return f"PAGEMAP_SCAN failed: {error.strerror}"
        finally:
            os.close(descriptor)
            del anchor
    return None


def has_present_page(pagemap: int, start: int, end: int) -> bool:
    """Whether the page tables have any page of [start, end). OSError: the kernel can't tell."""
    vector = ctypes.create_string_buffer(24)
    request = bytearray(
        struct.pack(
            "12Q",
            *(96, 0, start, end, 0, ctypes.addressof(vector), 1, 0),
            *(0, _PAGE_IS_PRESENT, 0, _PAGE_IS_PRESENT),
        )
    )
    return int(fcntl.ioctl(pagemap, _PAGEMAP_SCAN, request)) > 0


def kvm_obstacle() -> str | None:
    """Why KVM is not to be used here. /dev/kvm alone proves nothing: on a host without hardware

    virtualization it may exist, run firmware, and then hang on an ordinary kernel.
    """
    flags = cpu_flags()
    if not flags & {"vmx", "svm"}:
        return "the CPU advertises neither vmx nor svm"
    try:
        os.close(os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        return f"/dev/kvm can't be opened: {error.strerror}"
    return None


def cpu_flags() -> frozenset[str]:
    """The first CPU's flags, by /proc/cpuinfo."""
    for line in Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith(("flags", "Features")):
            return frozenset(line.partition(":")[2].split())
    return frozenset()
