"""libnfs by ctypes: the NFSv3 client library that QEMU uses too, as far as Ferry needs it.

Synchronous, and not for two threads at once: `connection.py` gives each `Export` a thread. A call
ends within `timeout_s` even where the server hangs. ctypes lets go of Python's lock meanwhile.

The library is Debian's libnfs13 (libnfs 4); the structs are those of its nfsc/libnfs.h.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

from migrator.errors import StorageError

LIBRARY: Final = "libnfs.so.13"
KEEP: Final = 0xFFFF_FFFF
"""As uid or gid of a chown: leave it as it is. NFSv3's SETATTR sets each by itself."""

_VERSION: Final = 3
_CALL_ERRORS: Final = {
    errno.EFAULT: "the connection broke",
    errno.EINTR: "no answer in time",
    errno.ETIMEDOUT: "no answer in time",
}
"""What libnfs itself says with these, whatever they are called elsewhere."""
_NOT_BEGUN: Final = "Failed to start connection. "
"""libnfs's words of a server whose name it can't resolve, or to which no route leads."""


class NfsError(OSError):
    """The server refused, or can't be reached. `errno` is the server's word, or ETIMEDOUT."""


class _Stat64(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_uint64)
        for name in (
            *("dev", "ino", "mode", "nlink", "uid", "gid", "rdev", "size", "blksize", "blocks"),
            *("atime", "mtime", "ctime", "atime_nsec", "mtime_nsec", "ctime_nsec", "used"),
        )
    ]


class _Statvfs(ctypes.Structure):
    """glibc's struct statvfs on 64-bit Linux, its first members."""

    _fields_ = [
        *((name, ctypes.c_ulong) for name in ("bsize", "frsize", "blocks", "bfree", "bavail")),
        ("rest", ctypes.c_ulong * 16),
    ]


class _Dirent(ctypes.Structure):
    _fields_ = [("next", ctypes.c_void_p), ("name", ctypes.c_char_p)]


@dataclass(frozen=True, slots=True)
class FileStatus:
    """What the server says of a file."""

    mode: int
    uid: int
    gid: int
    size_bytes: int
    used_bytes: int
    changed_at_s: float
    """By the server's clock."""

    @property
    def is_file(self) -> bool:
        return stat.S_ISREG(self.mode)


@functools.cache
def _library() -> ctypes.CDLL:
    """StorageError if it isn't installed."""
    try:
        library = ctypes.CDLL(LIBRARY)
    except OSError as error:
        raise StorageError(f"{LIBRARY} is not installed here (Debian: libnfs13)") from error
    context, text, number, size = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int, ctypes.c_uint64
    for name, result, *arguments in (
        ("nfs_init_context", context),
        ("nfs_destroy_context", None, context),
        ("nfs_get_error", text, context),
        ("nfs_set_version", number, context, number),
        ("nfs_set_uid", None, context, number),
        ("nfs_set_gid", None, context, number),
        ("nfs_set_timeout", None, context, number),
        ("nfs_set_tcp_syncnt", None, context, number),
        ("nfs_set_autoreconnect", None, context, number),
        ("nfs_set_dircache", None, context, number),
        ("nfs_mount", number, context, text, text),
        ("nfs_lstat64", number, context, text, ctypes.POINTER(_Stat64)),
        ("nfs_statvfs", number, context, text, ctypes.POINTER(_Statvfs)),
        ("nfs_mkdir2", number, context, text, number),
        ("nfs_rmdir", number, context, text),
        ("nfs_unlink", number, context, text),
        ("nfs_rename", number, context, text, text),
        ("nfs_link", number, context, text, text),
        ("nfs_lchown", number, context, text, number, number),
        ("nfs_chmod", number, context, text, number),
        ("nfs_open2", number, context, text, number, number, ctypes.POINTER(context)),
        ("nfs_close", number, context, context),
        ("nfs_pread", number, context, context, size, size, ctypes.c_void_p),
        ("nfs_pwrite", number, context, context, size, size, ctypes.c_char_p),
        ("nfs_ftruncate", number, context, context, size),
        ("nfs_fsync", number, context, context),
        ("nfs_opendir", number, context, text, ctypes.POINTER(context)),
        ("nfs_readdir", ctypes.POINTER(_Dirent), context, context),
        ("nfs_closedir", None, context, context),
    ):
        function = getattr(library, str(name))
        function.restype, function.argtypes = result, arguments
    return library


class Export:
    """A mounted export. Paths begin with a slash and are below it. NfsError everywhere."""

    def __init__(
        self, server: str, export: str, *, uid: int = 0, gid: int = 0, timeout_s: float = 5.0
    ) -> None:
        """Connect. What fails is closed again."""
        self._library = _library()
        self._where = f"{server}:{export}"
        self._context = self._library.nfs_init_context()
        if not self._context:
            raise NfsError(errno.ENOMEM, "libnfs can't make a context")
        try:
            library, context = self._library, self._context
            library.nfs_set_version(context, _VERSION)
            library.nfs_set_uid(context, uid)
            library.nfs_set_gid(context, gid)
            library.nfs_set_timeout(context, int(timeout_s * 1000))
            library.nfs_set_tcp_syncnt(context, 2)
            library.nfs_set_autoreconnect(context, 0)
            library.nfs_set_dircache(context, 0)
            self._check(library.nfs_mount(context, server.encode(), export.encode()), "")
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Idempotent."""
        if self._context:
            self._library.nfs_destroy_context(self._context)
            self._context = None

    # --- names and attributes ----------------------------------------------------------------

    def status(self, path: str) -> FileStatus:
        found = _Stat64()
        self._call("nfs_lstat64", path, ctypes.byref(found))
        return FileStatus(
            mode=found.mode,
            uid=found.uid,
            gid=found.gid,
            size_bytes=found.size,
            used_bytes=found.used,
            changed_at_s=float(found.mtime),
        )

    def room(self) -> tuple[int, int]:
        """Capacity and free bytes of the file system."""
        found = _Statvfs()
        self._call("nfs_statvfs", "/", ctypes.byref(found))
        unit = found.frsize or found.bsize
        return found.blocks * unit, found.bavail * unit

    def names(self, path: str) -> list[str]:
        """What a folder holds, without `.` and `..`; a name that is no text is left out."""
        handle = ctypes.c_void_p()
        self._call("nfs_opendir", path, ctypes.byref(handle))
        found = []
        try:
            while entry := self._library.nfs_readdir(self._context, handle):
                try:
                    name = entry.contents.name.decode()
                except UnicodeDecodeError:
                    continue
                if name not in (".", ".."):
                    found.append(name)
        finally:
            self._library.nfs_closedir(self._context, handle)
        return sorted(found)

    def make_folder(self, path: str, mode: int) -> None:
        self._call("nfs_mkdir2", path, mode)

    def remove_folder(self, path: str) -> None:
        self._call("nfs_rmdir", path)

    def unlink(self, path: str) -> None:
        self._call("nfs_unlink", path)

    def rename(self, path: str, target: str) -> None:
        self._call("nfs_rename", path, target.encode())

    def link(self, path: str, another: str) -> None:
        """Give a file a second name. FileExistsError's errno if that is taken."""
        self._call("nfs_link", path, another.encode())

    def chown(self, path: str, uid: int = KEEP, gid: int = KEEP) -> None:
        self._call("nfs_lchown", path, _signed(uid), _signed(gid))

    def chmod(self, path: str, mode: int) -> None:
        self._call("nfs_chmod", path, mode)

    # --- content -----------------------------------------------------------------------------

    @contextmanager
    def opened(self, path: str, flags: int, mode: int = 0) -> Iterator[Any]:
        """A handle for the calls below, closed at the end. `flags` as of os.open."""
        handle = ctypes.c_void_p()
        self._call("nfs_open2", path, flags, mode, ctypes.byref(handle))
        try:
            yield handle
        finally:
            self._library.nfs_close(self._context, handle)

    def touch(self, path: str) -> None:
        """Make an empty file. FileExistsError's errno if it is there."""
        with self.opened(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600):
            pass

    def read(self, handle: Any, offset: int, length: int) -> bytes:
        """May return less: up to the file's end."""
        buffer = ctypes.create_string_buffer(length)
        got = self._library.nfs_pread(self._context, handle, offset, length, buffer)
        return buffer.raw[: self._check(got, "read")]

    def write(self, handle: Any, offset: int, data: bytes) -> None:
        written = 0
        while written < len(data):
            rest = data[written:]
            got = self._library.nfs_pwrite(self._context, handle, offset + written, len(rest), rest)
            written += self._check(got, "write")

    def truncate(self, handle: Any, size_bytes: int) -> None:
        self._check(self._library.nfs_ftruncate(self._context, handle, size_bytes), "truncate")

    def sync(self, handle: Any) -> None:
        self._check(self._library.nfs_fsync(self._context, handle), "sync")

    def _call(self, function: str, path: str, *arguments: Any) -> int:
        result = getattr(self._library, function)(self._context, path.encode(), *arguments)
        return self._check(result, path)

    def _check(self, result: int, what: str) -> int:
        if result >= 0:
            return result
        code = -result
        said = (self._library.nfs_get_error(self._context) or b"").decode(errors="replace")
        _, not_begun, why = said.rpartition(_NOT_BEGUN)
        if not_begun:  # -1, whatever it was: it isn't EPERM, and no server has said anything.
            raise NfsError(errno.EHOSTUNREACH, why, self._where)
        reason = _CALL_ERRORS.get(code) or os.strerror(code)
        detail = f" ({said})" if said and code in (*_CALL_ERRORS, errno.EIO) else ""
        where = f"{self._where}{what}" if what.startswith("/") else self._where
        raise NfsError(code, f"{reason}{detail}", where)


def _signed(number: int) -> int:
    """A uid as the C int that libnfs takes."""
    return number - (1 << 32) if number >= 1 << 31 else number
