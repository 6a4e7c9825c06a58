"""A console's text is one domain's: a new domain of a deleted one's name begins with an empty one.

    a launch here ──► beside the console: which definition it is of ──► another's? it is removed

A hypervisor appends to the file, on each node where the domain has run; so when it is deleted there
are texts of it that nobody thinks of. They are looked at when the next domain of that name comes.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from pathlib import Path
from typing import Final

from migrator import durable
from migrator.errors import FerryError, StorageError
from migrator.model import DomainName
from migrator.own_threads import in_own_thread
from migrator.ports import HypervisorDriver, Struct
from node_agent.domain_records import DomainRecords

log = logging.getLogger(__name__)

CONSOLE_CHUNK_BYTES: Final = 64 * 1024
READ_S: Final = 5.0
"""For a look into a log; its disk may hang."""
BEGIN_S: Final = 2.0
"""That a launch waits for the store and the log's disk."""


class ConsoleChunk(Struct, frozen=True, kw_only=True):
    """A piece of a console log; `offset` is the position of its first byte."""

    offset: int
    data: bytes

    @property
    def end(self) -> int:
        """Where to go on reading."""
        return self.offset + len(self.data)


class Consoles:
    """See the module."""

    def __init__(self, hypervisor: HypervisorDriver, records: DomainRecords) -> None:
        self._hypervisor = hypervisor
        self._records = records

    async def begin(self, domain: DomainName) -> None:
        """Before its process is made here. Never fails: no text is worth a launch."""
        path = self._hypervisor.console_log(domain)
        try:
            async with asyncio.timeout(BEGIN_S):
                defined_at_s = (await self._records.get(domain)).defined_at_s
                await in_own_thread("consoles", lambda: _begin(path, defined_at_s))
        except (FerryError, OSError) as error:  # A TimeoutError is an OSError.
            log.warning("whose text is in %s isn't known: %s", path, str(error) or "no answer")


async def read_console(path: Path, offset: int | None, limit_bytes: int) -> ConsoleChunk:
    """From `offset` on; None: the last `limit_bytes`. StorageError: its disk hangs."""
    limit_bytes = max(1, min(limit_bytes, CONSOLE_CHUNK_BYTES))
    try:
        async with asyncio.timeout(READ_S):
            return await in_own_thread("consoles", lambda: _read(path, offset, limit_bytes))
    except TimeoutError as error:
        raise StorageError(
            f"{path} can't be read: its disk gave no answer in {READ_S:g} s"
        ) from error


def _read(path: Path, offset: int | None, limit_bytes: int) -> ConsoleChunk:
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if offset is None:
                offset = max(0, size - limit_bytes)
            elif offset > size:
                offset = 0
            file.seek(offset)
            return ConsoleChunk(offset=offset, data=file.read(limit_bytes))
    except FileNotFoundError:
        return ConsoleChunk(offset=0, data=b"")


def _begin(path: Path, defined_at_s: float) -> None:
    """OSError. The time is the definition's name here; no clock is compared with it, except by a
    text from before there were such names.
    """
    whose, own = path.with_name(f"{path.name}.whose"), f"{defined_at_s!r}\n"
    with contextlib.suppress(FileNotFoundError):
        if whose.read_text() == own:
            return
        path.unlink(missing_ok=True)
    with contextlib.suppress(FileNotFoundError):
        if path.stat().st_mtime < defined_at_s:
            path.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    durable.replace(whose, own.encode())
