"""The files that a QEMU appends to: the serial console and its own messages.

QEMU can't bound them, so the driver does: past LOG_BYTES_MAX it keeps the last LOG_BYTES_KEPT.
QEMU opens both with O_APPEND, so truncation under it is safe; what it writes in the microseconds
between our read and our truncation is lost. The functions block; call them off the event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
from pathlib import Path

from migrator.own_threads import in_own_thread

LOG_BYTES_MAX = 16 * 1024 * 1024
LOG_BYTES_KEPT = 1024 * 1024
TAIL_BYTES = 2000
"""How much of QEMU's own messages goes into an error."""
_TIMESTAMP = re.compile(r"^\d{4}-\d\d-\d\dT[\d:.]+Z ")
"""Of QEMU's `-msg timestamp=on`: for the log."""


def trim(path: Path) -> None:
    """Keep a log within its bound. A log that can't be trimmed disturbs nobody."""
    with contextlib.suppress(OSError):
        size = path.stat().st_size
        if size <= LOG_BYTES_MAX:
            return
        descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CLOEXEC)
        try:
            kept = os.pread(descriptor, LOG_BYTES_KEPT, size - LOG_BYTES_KEPT)
            os.ftruncate(descriptor, 0)
            os.write(descriptor, kept)
        finally:
            os.close(descriptor)


def make_ready(console: Path, messages: Path) -> int:
    """Bound both logs before a start; returns where QEMU's new messages will begin."""
    trim(console)
    trim(messages)
    return size_bytes(messages)


def size_bytes(path: Path) -> int:
    """The file's size; 0 if it isn't there."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


def since(path: Path, offset: int) -> str:
    """The last words written after `offset`, on one line and without the time of each; empty if
    there are none.
    """
    try:
        with path.open("rb") as file:
            file.seek(max(offset, size_bytes(path) - TAIL_BYTES))
            text = file.read(TAIL_BYTES).decode("utf-8", errors="replace")
    except OSError:
        return ""
    lines = (_TIMESTAMP.sub("", line.strip()) for line in text.splitlines())
    return " / ".join(line for line in lines if line)


class Trimmer:
    """Trims aside: nobody who asks how a domain is waits for the logs' disk, which may hang.

    One thread at most is at it, of its own. Those of the event loop are few, and the heartbeat's.
    """

    def __init__(self) -> None:
        self._waiting: set[Path] = set()
        self._under_way: asyncio.Future[None] | None = None

    def soon(self, *paths: Path) -> None:
        """Never waits. What comes while a trim is under way has its turn with the next call."""
        self._waiting.update(paths)
        if self._under_way is not None and not self._under_way.done():
            return
        turn, self._waiting = self._waiting, set()
        with contextlib.suppress(OSError):  # The host has no thread left: another time.
            self._under_way = in_own_thread("logs", lambda: _trim_all(turn))


def _trim_all(paths: set[Path]) -> None:
    for path in sorted(paths):
        trim(path)
