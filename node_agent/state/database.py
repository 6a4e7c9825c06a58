"""The state store's SQL: one SQLite file, one connection, one thread. Nothing here is async.

Every write is one short `BEGIN IMMEDIATE` transaction that takes the next revision, changes
`entries` and adds a row to `changes`, the log that watchers read. The file is in WAL mode with
synchronous=FULL: a commit is on the disk when it returns, and survives SIGKILL and power loss.

    meta       revision: the newest; trimmed: changes up to this revision are no longer in the log
    entries    what is: key, value, the revision of the last write
    changes    what happened: one row a revision; value NULL is a deletion
    sequences  the last number given out below a prefix

Checkpoints (copying the log file back) are not done by commits, which would delay one in a
thousand of them, but by `housekeep` once nobody has written for a while.
"""

from __future__ import annotations

import contextlib
import logging
import sqlite3
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from migrator import durable
from migrator.errors import StoreError
from node_agent.state.port import Change, Entry, Swap, Written
from node_agent.state.watches import KEPT_CHANGES, check_key, sequence_key

log = logging.getLogger(__name__)

SCHEMA_VERSION: Final = 1
APPLICATION_ID: Final = 0x46455259  # "FERY"
_TRIM_EVERY: Final = 256
_CHECKPOINT_AFTER_COMMITS: Final = 64
_CHECKPOINT_IDLE_S: Final = 1.0
_CHECKPOINT_AT_LATEST_COMMITS: Final = 4096
_LOCK_RETRY_S: Final = 0.0005
_AFTER_PREFIX: Final = "\U0010ffff"
"""Sorts after every character that a key can have."""

_SCHEMA: Final = (
    """CREATE TABLE IF NOT EXISTS meta (
        id INTEGER PRIMARY KEY CHECK (id = 1), revision INTEGER NOT NULL, trimmed INTEGER NOT NULL
    )""",
    "INSERT OR IGNORE INTO meta VALUES (1, 0, 0)",
    """CREATE TABLE IF NOT EXISTS entries (
        key TEXT PRIMARY KEY, value BLOB NOT NULL, revision INTEGER NOT NULL
    ) WITHOUT ROWID""",
    "CREATE TABLE IF NOT EXISTS changes (revision INTEGER PRIMARY KEY, key TEXT, value BLOB)",
    "CREATE TABLE IF NOT EXISTS sequences (prefix TEXT PRIMARY KEY, last INTEGER) WITHOUT ROWID",
    f"PRAGMA application_id = {APPLICATION_ID}",
    f"PRAGMA user_version = {SCHEMA_VERSION}",
)


class Compacted(StoreError):
    """The changes that a watcher needs are no longer in the log: it lists again."""


class Database:
    """One connection. Every method raises StoreError, and then a write's outcome is unknown."""

    def __init__(self, path: Path, busy_timeout_s: float) -> None:
        """Open or create the file. StoreError names it; nothing is left open."""
        self.path = path
        self._busy_timeout_s = busy_timeout_s
        self._commits_since_checkpoint = 0
        self._last_commit_at_s = 0.0
        self._written_revision = 0
        self.own_revision = 0
        """The newest revision that this connection has committed."""
        with self._errors():
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                # Either a cluster's first agent, or a path that isn't the cluster's.
                log.warning("there is no store at %s yet: a new, empty one is made", path)
            durable.make_private(path)  # Hooks' secrets are in it.
            self._connection = sqlite3.connect(path, timeout=busy_timeout_s, isolation_level=None)
        try:
            with self._errors():
                self._prepare(time.monotonic() + busy_timeout_s)
                durable.close_to_others(path)
        except BaseException:
            self._connection.close()
            raise

    def _prepare(self, deadline_s: float) -> None:
        execute = self._connection.execute
        while True:
            try:
                # Two processes that switch a new file to WAL at once: SQLite doesn't wait here.
                mode = execute("PRAGMA journal_mode = WAL").fetchone()[0]
                break
            except sqlite3.OperationalError:
                if time.monotonic() > deadline_s:
                    raise
                time.sleep(0.01)
        if mode != "wal":
            raise StoreError(f"{self.path}: its file system can't share a file between processes")
        execute("PRAGMA synchronous = FULL")
        execute("PRAGMA wal_autocheckpoint = 0")
        if self._is_ours():
            return
        execute("BEGIN IMMEDIATE")
        try:
            if not self._is_ours():
                for statement in _SCHEMA:
                    execute(statement)
            execute("COMMIT")
        except BaseException:
            execute("ROLLBACK")
            raise

    def _is_ours(self) -> bool:
        """False: an empty file. StoreError: somebody else's, or a newer Ferry's."""
        execute = self._connection.execute
        # First: another process may write the layout between these, and that comes with the rest.
        if execute("SELECT count(*) FROM sqlite_master").fetchone()[0] == 0:
            return False
        application = execute("PRAGMA application_id").fetchone()[0]
        version = execute("PRAGMA user_version").fetchone()[0]
        if application == APPLICATION_ID and version == SCHEMA_VERSION:
            return True
        if application == APPLICATION_ID:
            raise StoreError(f"{self.path}: its layout is version {version}, not {SCHEMA_VERSION}")
        raise StoreError(f"{self.path}: a database, but not Ferry's")

    def close(self) -> None:
        with contextlib.suppress(sqlite3.Error):
            self._connection.close()

    # reads

    def get(self, key: str) -> Entry | None:
        with self._errors():
            row = self._connection.execute(
                "SELECT value, revision FROM entries WHERE key = ?", (key,)
            ).fetchone()
        return None if row is None else Entry(key=key, value=row[0], revision=row[1])

    def list_prefix(self, prefix: str) -> Sequence[Entry]:
        with self._errors():
            rows = self._connection.execute(
                "SELECT key, value, revision FROM entries WHERE key >= ? AND key < ? ORDER BY key",
                (prefix, prefix + _AFTER_PREFIX),
            ).fetchall()
        return [Entry(key=key, value=value, revision=revision) for key, value, revision in rows]

    def list_written(self, prefix: str, since_revision: int) -> Written:
        execute, bounds = self._connection.execute, (prefix, prefix + _AFTER_PREFIX)
        with self._errors(), self._snapshot():
            rows = execute(
                "SELECT key, value, revision FROM entries WHERE key >= ? AND key < ? "
                "AND revision > ? ORDER BY key",
                (*bounds, since_revision),
            ).fetchall()
            count = execute(
                "SELECT count(*) FROM entries WHERE key >= ? AND key < ?", bounds
            ).fetchone()[0]
            revision = execute("SELECT revision FROM meta").fetchone()[0]
        return Written(
            entries=[Entry(key=key, value=value, revision=at) for key, value, at in rows],
            count=count,
            revision=revision,
        )

    def revision(self) -> int:
        """The newest revision."""
        with self._errors():
            return int(self._connection.execute("SELECT revision FROM meta").fetchone()[0])

    def data_version(self) -> int:
        """Changes whenever another connection has committed. Costs a few microseconds."""
        with self._errors():
            return int(self._connection.execute("PRAGMA data_version").fetchone()[0])

    def changes_since(self, revision: int) -> Sequence[Change]:
        """All changes after `revision`, in order. Compacted if some are no longer known."""
        execute = self._connection.execute
        with self._errors(), self._snapshot():
            newest, trimmed = execute("SELECT revision, trimmed FROM meta").fetchone()
            rows = execute(
                "SELECT key, value, revision FROM changes WHERE revision > ? ORDER BY revision",
                (revision,),
            ).fetchall()
        if not trimmed <= revision <= newest:
            raise Compacted(
                f"changes after revision {revision} are not known (only those after {trimmed} up "
                f"to {newest}): list again"
            )
        return [Change(key=key, value=value, revision=number) for key, value, number in rows]

    # writes

    def put_if(self, key: str, value: bytes, expected_revision: int | None) -> int | None:
        check_key(key)
        with self._transaction():
            if self._revision_of(key) != expected_revision:
                return None
            return self._write(key, value)

    def put(self, key: str, value: bytes) -> int:
        check_key(key)
        with self._transaction():
            return self._write(key, value)

    def delete_if(self, key: str, expected_revision: int) -> bool:
        with self._transaction():
            if self._revision_of(key) != expected_revision:
                return False
            self._write(key, None)
            return True

    def append(self, prefix: str, value: bytes, keep: int) -> int:
        with self._transaction():
            return self._append(prefix, value, keep)

    def append_if(self, prefix: str, value: bytes, keep: int, swap: Swap) -> bool:
        check_key(swap.key)
        with self._transaction():
            if self._revision_of(swap.key) != swap.expected_revision:
                return False
            self._write(swap.key, swap.value)
            self._append(prefix, value, keep)
            return True

    def _append(self, prefix: str, value: bytes, keep: int) -> int:
        """Inside a transaction: write under the next number below `prefix`, and return it."""
        execute = self._connection.execute
        number = int(
            execute(
                "INSERT INTO sequences VALUES (?, 1) "
                "ON CONFLICT (prefix) DO UPDATE SET last = last + 1 RETURNING last",
                (prefix,),
            ).fetchone()[0]
        )
        self._write(sequence_key(prefix, number), value)
        old = execute(
            "SELECT key FROM entries WHERE key >= ? AND key < ?",
            (prefix, sequence_key(prefix, max(0, number - max(keep, 1) + 1))),
        ).fetchall()
        for (key,) in old:
            self._write(key, None)
        return number

    def _revision_of(self, key: str) -> int | None:
        row = self._connection.execute(
            "SELECT revision FROM entries WHERE key = ?", (key,)
        ).fetchone()
        return None if row is None else int(row[0])

    def _write(self, key: str, value: bytes | None) -> int:
        """Inside a transaction: write or delete, log it, and return the new revision."""
        execute = self._connection.execute
        row = execute("UPDATE meta SET revision = revision + 1 RETURNING revision").fetchone()
        revision = self._written_revision = int(row[0])
        if value is None:
            execute("DELETE FROM entries WHERE key = ?", (key,))
        else:
            execute("INSERT OR REPLACE INTO entries VALUES (?, ?, ?)", (key, value, revision))
        execute("INSERT INTO changes VALUES (?, ?, ?)", (revision, key, value))
        if revision % _TRIM_EVERY == 0 and revision > KEPT_CHANGES:
            trimmed = revision - KEPT_CHANGES
            execute("DELETE FROM changes WHERE revision <= ?", (trimmed,))
            execute("UPDATE meta SET trimmed = ?", (trimmed,))
        return revision

    def housekeep(self) -> None:
        """Checkpoint if there is something to do and nobody is in a hurry. Ignores errors."""
        idle_s = time.monotonic() - self._last_commit_at_s
        commits = self._commits_since_checkpoint
        if commits >= _CHECKPOINT_AT_LATEST_COMMITS or (
            commits >= _CHECKPOINT_AFTER_COMMITS and idle_s >= _CHECKPOINT_IDLE_S
        ):
            self._commits_since_checkpoint = 0
            with contextlib.suppress(sqlite3.Error):
                self._connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()

    def _begin_write(self) -> None:
        """Take the file's write lock, within the busy timeout.

        SQLite's own waiting sleeps up to 100 ms a time; a handoff's write waits in the blackout,
        for transactions that take one.
        """
        execute = self._connection.execute
        deadline_s = time.monotonic() + self._busy_timeout_s
        execute("PRAGMA busy_timeout = 0")
        try:
            while True:
                try:
                    execute("BEGIN IMMEDIATE")
                    return
                except sqlite3.OperationalError as error:
                    busy = (error.sqlite_errorcode & 0xFF) == sqlite3.SQLITE_BUSY
                    if not busy or time.monotonic() > deadline_s:
                        raise
                time.sleep(_LOCK_RETRY_S)
        finally:
            execute(f"PRAGMA busy_timeout = {int(self._busy_timeout_s * 1000)}")

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._errors():
            self._begin_write()
            try:
                yield
                self._connection.execute("COMMIT")
                self.own_revision = self._written_revision
            finally:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
            self._commits_since_checkpoint += 1
            self._last_commit_at_s = time.monotonic()

    @contextlib.contextmanager
    def _snapshot(self) -> Iterator[None]:
        """What is read in it is of one revision."""
        self._connection.execute("BEGIN")
        try:
            yield
        finally:
            self._connection.execute("COMMIT")

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            raise StoreError(f"{self.path}: {error}") from error
