"""Hears of the last close of a device: a macvtap, other than a tap, outlives its hypervisor.

inotify tells when the last descriptor of an open file is closed, in whichever process it was.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Final

from migrator.errors import FabricError

_IN_CLOSE_WRITE: Final = 0x8
_IN_IGNORED: Final = 0x8000
_EVENT: Final = struct.Struct("iIII")
_READ_BYTES: Final = 4096
_libc: Final = ctypes.CDLL(None, use_errno=True)


class Closings:
    """Belongs to one event loop; `close` ends it all."""

    def __init__(self, closed: Callable[[tuple[str, int]], None]) -> None:
        """`closed` gets the name and the index that `watch` was given, from the event loop."""
        self._closed = closed
        self._fd: int | None = None
        self._names: dict[int, tuple[str, int]] = {}

    def watch(self, name: tuple[str, int], path: Path) -> None:
        """From now on. FabricError: the kernel refuses."""
        if self._fd is None:
            fd = _libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
            if fd < 0:
                raise FabricError(f"can't watch devices: {os.strerror(ctypes.get_errno())}")
            self._fd = fd
            asyncio.get_running_loop().add_reader(fd, self._take)
        number = _libc.inotify_add_watch(self._fd, os.fsencode(path), _IN_CLOSE_WRITE)
        if number < 0:
            raise FabricError(f"can't watch {path}: {os.strerror(ctypes.get_errno())}")
        self._names[number] = name

    def close(self) -> None:
        """Idempotent; it can be used again."""
        if self._fd is not None:
            asyncio.get_running_loop().remove_reader(self._fd)
            os.close(self._fd)
            self._fd = None
            self._names.clear()

    def _take(self) -> None:
        if self._fd is None:
            return
        try:
            data = os.read(self._fd, _READ_BYTES)
        except BlockingIOError:
            return
        at = 0
        while at < len(data):
            number, mask, _, length = _EVENT.unpack_from(data, at)
            at += _EVENT.size + length
            name = self._names.get(number)
            if mask & _IN_IGNORED:
                self._names.pop(number, None)
            elif name is not None:
                self._closed(name)
