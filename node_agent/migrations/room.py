"""Room for the journal: a node without any can't begin a migration, nor take one in.

Both ends of a migration write each step down before they act on it. Where the disk is full, takes
no writes or hangs, the first step fails, and the domain stays claimed until the end of that can be
written.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Final, TypeVar

from migrator.errors import StorageError, words
from migrator.own_threads import STATE_DIRECTORY, in_own_thread

STATE_ROOM_BYTES: Final = 2**20
"""Less is full: an entry is some KiB, and SQLite's log of them grows by steps."""


LOOK_S: Final = 3.0
"""For a look at the disk: less than `manager.INSPECT_S`, also twice."""
T = TypeVar("T")


def free_bytes(folder: Path) -> int:
    """What may still be written there. OSError."""
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize


def try_out(folder: Path) -> None:
    """Write, to the disk: one that takes no writes, or hangs, has room all the same. OSError."""
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(b"ferry")
        file.flush()
        os.fsync(file.fileno())


async def in_state_directory(folder: Path, look: Callable[[], T]) -> T:
    """Off the event loop, within LOOK_S. StorageError: its disk hangs; OSError."""
    try:
        async with asyncio.timeout(LOOK_S):
            return await in_own_thread(STATE_DIRECTORY, look)
    except TimeoutError as error:
        raise StorageError(
            f"its state directory {folder} gives no answer within {LOOK_S:g} s: its disk hangs"
        ) from error


def at_source(node: str) -> str:
    """What a source's reasons begin with, which speak against any destination."""
    return f"{node}, where it runs: "


async def room_reasons(folder: Path) -> list[str]:
    """Why a node can't journal a migration now; empty if it can."""

    def look() -> int:
        free = free_bytes(folder)
        if free >= STATE_ROOM_BYTES:
            try_out(folder)
        return free

    try:
        free = await in_state_directory(folder, look)
    except StorageError as error:
        return [str(error)]
    except OSError as error:
        return [f"its state directory {folder} can't be used: {words(error)}"]
    if free >= STATE_ROOM_BYTES:
        return []
    return [
        f"its disk is full: {free / 2**10:.0f} KiB free in {folder}, where migrations are "
        f"journalled; {STATE_ROOM_BYTES / 2**10:.0f} KiB are needed"
    ]
