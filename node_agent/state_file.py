"""A small file of the agent's own in the state directory: written whole, in order, not for ever.

A disk that hangs holds up nobody who notes something there: the write is waited for DISK_S, and the
next one begins when it has ended, so that what comes late overwrites nothing newer.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Final

from migrator import durable
from migrator.errors import StoreError, words
from migrator.own_threads import STATE_DIRECTORY, in_own_thread
from node_agent.background import uninterrupted

DISK_S: Final = 3.0
"""For a disk that is slow."""


class StateFile:
    """One file; one instance writes it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._writing = asyncio.Lock()
        self._under_way: asyncio.Future[None] | None = None

    async def read(self) -> bytes | None:
        """None: it isn't there. StoreError."""
        try:
            return await in_own_thread(STATE_DIRECTORY, self._path.read_bytes)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise StoreError(f"{self._path} can't be read: {words(error)}") from error

    async def write(self, content: bytes) -> None:
        """Durable when it returns. StoreError: it is as it was; of a disk that hangs it may yet
        become this.
        """
        async with self._writing:  # In their order.
            try:
                await uninterrupted(self._write(content))
            except OSError as error:
                raise StoreError(f"{self._path} can't be written: {words(error)}") from error

    async def _write(self, content: bytes) -> None:
        if self._under_way is not None:
            await _done(self._under_way)
        self._under_way = in_own_thread(
            STATE_DIRECTORY, lambda: durable.replace(self._path, content)
        )
        self._under_way.add_done_callback(_forget)
        await _done(self._under_way)
        self._under_way.result()


async def _done(writing: asyncio.Future[None]) -> None:
    """TimeoutError: it isn't, and goes on."""
    if not (await asyncio.wait({writing}, timeout=DISK_S))[0]:
        raise TimeoutError(f"its disk gave no answer in {DISK_S:g} s")


def _forget(writing: asyncio.Future[None]) -> None:
    if not writing.cancelled():
        writing.exception()
