"""A node's journal of its migrations: one SQLite file of its own, written before what it announces.

A durable write is on the disk when it returns (fsync). A write that isn't durable outlives the
agent, not the host: it takes no fsync, and is meant for what matters only while the host is up.

A migration that is under way may not fail by a disk that fills up meanwhile: its guest would stand
still. So the journal takes room beforehand (`ROOM_BYTES`): pages of its file that are free, and
blocks of SQLite's log, which is written from its beginning again after each migration's end.

All SQL runs in one thread that the journal owns; the event loop never waits for the disk.

Ended entries are forgotten in the order in which they were written, whatever the clock said: an
entry that is forgotten is answered for as one that never was, which may undo a handoff. So `at`
grows from write to write.
"""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final, TypeVar

import msgspec

from migrator import durable
from migrator.errors import StoreError
from migrator.journal_entry import JournalEntry
from migrator.unknown_fields import decode

T = TypeVar("T")

KEEP_ENDED: Final = 1_000
"""Ended entries kept, so that the other side of a migration always gets its answer."""
ROOM_BYTES: Final = 2**20
"""An entry is some KiB, a dozen of them a migration; eight may be under way."""
_LATER_S: Final = 0.001

_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS migrations (
    id TEXT PRIMARY KEY, ended INTEGER NOT NULL, entry BLOB NOT NULL, at REAL NOT NULL
) WITHOUT ROWID
"""


class MigrationJournal:
    """See the module. Errors: StoreError; what was written before is as it was."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="journal")
        self._connection: sqlite3.Connection | None = None
        self._entries: dict[str, JournalEntry] = {}
        """In the order of their last writes."""
        self._last_at = 0.0

    @property
    def folder(self) -> Path:
        """Where it is, on the disk that has to have room for it."""
        return self._path.parent

    async def open(self) -> Sequence[JournalEntry]:
        """Every entry, ended ones too. StoreError if the file can't be used."""
        entries = await self._run(self._open)
        self._entries = {entry.migration_id: entry for entry in entries}
        return entries

    async def close(self) -> None:
        """Idempotent."""
        if self._connection is not None:
            await self._run(self._connection.close)
            self._connection = None
        self._thread.shutdown(wait=False)

    def get(self, migration_id: str) -> JournalEntry | None:
        """The newest entry of a migration, from memory."""
        return self._entries.get(migration_id)

    async def write(self, entry: JournalEntry, *, durable: bool = True) -> None:
        """Replace the migration's entry. See the module for `durable`."""
        packed = msgspec.msgpack.encode(entry)
        await self._run(lambda: self._write(entry, packed, durable))
        self._entries.pop(entry.migration_id, None)
        self._entries[entry.migration_id] = entry
        if entry.ended:
            self._forget_oldest()

    def _forget_oldest(self) -> None:
        """In memory as in the file: no more than KEEP_ENDED ended entries."""
        ended = [each for each in self._entries.values() if each.ended]
        for each in ended[: max(0, len(ended) - KEEP_ENDED)]:
            del self._entries[each.migration_id]

    async def _run(self, work: Callable[[], T]) -> T:
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self._thread, work)
        except (sqlite3.Error, OSError) as error:
            raise StoreError(f"the journal {self._path} can't be used: {error}") from error
        except RuntimeError as error:  # The thread was shut down.
            raise StoreError(f"the journal {self._path} is closed") from error

    def _open(self) -> list[JournalEntry]:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        durable.make_private(self._path)
        connection = sqlite3.connect(
            self._path, isolation_level=None, timeout=5.0, check_same_thread=False
        )
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=FULL")
        # What is read now is acted on: also what was written without an fsync must stay.
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        connection.execute(_SCHEMA)
        _take_room(connection)
        durable.close_to_others(self._path)
        self._connection = connection
        decoder = msgspec.msgpack.Decoder(JournalEntry)
        rows = connection.execute("SELECT id, entry, at FROM migrations ORDER BY at").fetchall()
        self._last_at = rows[-1][2] if rows else 0.0
        try:
            return [decode(row[1], decoder) for row in rows]
        except (msgspec.DecodeError, msgspec.ValidationError) as error:
            raise StoreError(
                f"the journal {self._path} has an unreadable entry: {error}"
            ) from error

    def _write(self, entry: JournalEntry, packed: bytes, durable: bool) -> None:
        if self._connection is None:
            raise StoreError("the journal is closed")
        execute = self._connection.execute
        # In WAL mode NORMAL leaves out the commit's fsync, but none that a checkpoint needs.
        execute(f"PRAGMA synchronous={'FULL' if durable else 'NORMAL'}")
        at = max(entry.ended_at_s or entry.created_at_s, self._last_at + _LATER_S)
        execute(
            "INSERT OR REPLACE INTO migrations (id, ended, entry, at) VALUES (?, ?, ?, ?)",
            (entry.migration_id, entry.ended, packed, at),
        )
        self._last_at = at
        if entry.ended:
            execute(
                "DELETE FROM migrations WHERE ended AND id NOT IN "
                "(SELECT id FROM migrations WHERE ended ORDER BY at DESC LIMIT ?)",
                (KEEP_ENDED,),
            )
            _empty_log(self._connection)


def _take_room(connection: sqlite3.Connection) -> None:
    """Where there is any; an agent on a full disk has its guests to look after all the same."""
    with contextlib.suppress(sqlite3.OperationalError):
        connection.execute("CREATE TABLE IF NOT EXISTS room (filler BLOB NOT NULL)")
        connection.execute("INSERT INTO room VALUES (zeroblob(?))", (ROOM_BYTES,))
    with contextlib.suppress(sqlite3.OperationalError):
        connection.execute("DELETE FROM room")
    _empty_log(connection)


def _empty_log(connection: sqlite3.Connection) -> None:
    """Into the file, so that it is written from its beginning again; it keeps its blocks. What
    can't be done now stays in it."""
    with contextlib.suppress(sqlite3.OperationalError):
        connection.execute("PRAGMA wal_checkpoint(PASSIVE)")
