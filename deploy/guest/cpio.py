"""The newc cpio format, as the kernel reads an initrd: pure, and the same bytes every time.

Format: the kernel's Documentation/driver-api/early-userspace/buffer-format.rst.
"""

from __future__ import annotations

import stat
from collections.abc import Iterable
from dataclasses import dataclass

_MAGIC = b"070701"
_TRAILER = "TRAILER!!!"


@dataclass(frozen=True, slots=True)
class CpioEntry:
    """One file system object. `mode` holds its type and its permissions, as in `st_mode`."""

    path: str
    """Relative, without a leading slash."""
    mode: int
    data: bytes = b""
    """A file's contents, or a symbolic link's target."""
    device: tuple[int, int] = (0, 0)
    """Major and minor number of a device node."""


def directory(path: str) -> CpioEntry:
    return CpioEntry(path, stat.S_IFDIR | 0o755)


def file(path: str, data: bytes, *, executable: bool = False) -> CpioEntry:
    return CpioEntry(path, stat.S_IFREG | (0o755 if executable else 0o644), data)


def symlink(path: str, target: str) -> CpioEntry:
    return CpioEntry(path, stat.S_IFLNK | 0o777, target.encode())


def character_device(path: str, major: int, minor: int) -> CpioEntry:
    return CpioEntry(path, stat.S_IFCHR | 0o600, device=(major, minor))


def write_newc(entries: Iterable[CpioEntry]) -> bytes:
    """An archive of `entries` in their order, owned by root, with all times 0.

    A directory must come before what is in it. Raises ValueError for a path that is empty,
    absolute, or given twice.
    """
    seen: set[str] = set()
    parts: list[bytes] = []
    for inode, entry in enumerate(entries, start=1):
        if not entry.path or entry.path.startswith("/") or entry.path in seen:
            raise ValueError(f"cpio path {entry.path!r} is empty, absolute or a duplicate")
        seen.add(entry.path)
        parts.append(_encode(entry, inode))
    parts.append(_encode(CpioEntry(_TRAILER, 0), 0))
    return b"".join(parts)


def _encode(entry: CpioEntry, inode: int) -> bytes:
    name = entry.path.encode() + b"\0"
    links = 2 if stat.S_ISDIR(entry.mode) else 1
    major, minor = entry.device
    # ino, mode, uid, gid, nlink, mtime, filesize, devmajor, devminor, rdevmajor, rdevminor,
    # namesize, check
    numbers = (inode, entry.mode, 0, 0, links, 0, len(entry.data), 0, 0, major, minor)
    header = _MAGIC + b"".join(b"%08X" % number for number in (*numbers, len(name), 0))
    return _padded(header + name) + _padded(entry.data)


def _padded(data: bytes) -> bytes:
    return data + b"\0" * (-len(data) % 4)
