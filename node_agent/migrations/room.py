"""Room for the journal: a node without any can't begin a migration, nor take one in.

Both ends of a migration write each step down before they act on it. Where the disk is full the
first step fails, and the domain stays claimed until the end of that can be written.
"""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Final

from migrator.errors import words

STATE_ROOM_BYTES: Final = 2**20
"""Less is full: an entry is some KiB, and SQLite's log of them grows by steps."""


def free_bytes(folder: Path) -> int:
    """What may still be written there. OSError."""
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize


def at_source(node: str) -> str:
    """What a source's reasons begin with, which speak against any destination."""
    return f"{node}, where it runs: "


async def room_reasons(folder: Path) -> list[str]:
    """Why a node can't journal a migration now; empty if it can."""
    try:
        free = await asyncio.to_thread(free_bytes, folder)
    except OSError as error:
        return [f"its state directory {folder} can't be used: {words(error)}"]
    if free >= STATE_ROOM_BYTES:
        return []
    return [
        f"its disk is full: {free / 2**10:.0f} KiB free in {folder}, where migrations are "
        f"journalled; {STATE_ROOM_BYTES / 2**10:.0f} KiB are needed"
    ]
