"""The embedded state store: one SQLite file that all agents of a machine share.

    event loop                         thread "state-store"
      │  put_if(...)                       │
      │ ── job ──────────────────────────► │ one transaction, on the disk when it returns
      │ ◄────────────────────── revision ──┤
      │ ◄─────────────── changes (Watch) ──┤ own ones at once; those of other processes by
      │                                    │ looking at data_version every 25 ms, only while
      │                                    │ somebody watches

All SQL runs in that thread (`Database`). Watching begins in it too, between two transactions, so
that no change is missed or repeated; its changes reach the loop in the order of their revisions.

A cancelled write may still be carried out, as one that ends in StoreError may.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Final, TypeVar

from migrator.errors import StoreError
from node_agent.state.database import Database
from node_agent.state.port import Change, Entry, StateStore, Swap, Written
from node_agent.state.watches import StoreClosed, Watch

T = TypeVar("T")
_JOBS_LIMIT: Final = 1024
_IDLE_S: Final = 1.0

_Job = tuple[Callable[[Database], Any], "asyncio.Future[Any]"]


class SqliteStore(StateStore):
    """See the module. One instance an agent; any number of processes share the file.

    `busy_timeout_s` bounds how long a write waits for other processes' writes,
    `operation_timeout_s` how long any call takes, also on a hanging disk; both end in StoreError.
    """

    name: ClassVar[str] = "sqlite"

    def __init__(
        self,
        path: Path,
        *,
        busy_timeout_s: float = 2.0,
        operation_timeout_s: float = 5.0,
        watch_poll_s: float = 0.025,
    ) -> None:
        self._path = path
        self._busy_timeout_s = busy_timeout_s
        self._operation_timeout_s = operation_timeout_s
        self._watch_poll_s = watch_poll_s
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._ended: asyncio.Future[None] | None = None
        self._watches: list[weakref.ref[Watch]] = []
        """The thread's: watches that the loop may still be reading."""
        self._seen_revision = 0
        self._seen_data_version = -1

    async def open(self) -> None:
        if self._ended is not None:
            raise StoreError(f"{self._path}: is open already")
        loop = asyncio.get_running_loop()
        opened: asyncio.Future[None] = loop.create_future()
        self._ended = loop.create_future()
        self._jobs = queue.SimpleQueue()
        threading.Thread(
            target=self._run, args=(loop, opened, self._ended), name="state-store", daemon=True
        ).start()
        try:
            async with asyncio.timeout(self._busy_timeout_s + self._operation_timeout_s):
                await opened
        except TimeoutError:
            await self.close()
            raise StoreError(f"{self._path}: opening it took too long") from None
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        """Finish what was asked for, then end the thread and every watch. Idempotent."""
        ended, self._ended = self._ended, None
        if ended is None:
            return
        self._jobs.put(None)
        # A thread that hangs in the disk is left behind (it is a daemon), not waited for.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._operation_timeout_s):
                await asyncio.shield(ended)

    async def get(self, key: str) -> Entry | None:
        return await self._perform(lambda database: database.get(key))

    async def list_prefix(self, prefix: str) -> Sequence[Entry]:
        return await self._perform(lambda database: database.list_prefix(prefix))

    async def list_written(self, prefix: str, since_revision: int) -> Written:
        return await self._perform(lambda database: database.list_written(prefix, since_revision))

    async def put_if(self, key: str, value: bytes, expected_revision: int | None) -> int | None:
        return await self._perform(lambda database: database.put_if(key, value, expected_revision))

    async def put(self, key: str, value: bytes) -> int:
        return await self._perform(lambda database: database.put(key, value))

    async def append(self, prefix: str, value: bytes, *, keep: int) -> int:
        return await self._perform(lambda database: database.append(prefix, value, keep))

    async def append_if(self, prefix: str, value: bytes, *, keep: int, swap: Swap) -> bool:
        return await self._perform(lambda database: database.append_if(prefix, value, keep, swap))

    async def delete_if(self, key: str, expected_revision: int) -> bool:
        return await self._perform(lambda database: database.delete_if(key, expected_revision))

    def watch(self, prefix: str, since_revision: int | None = None) -> AsyncIterator[Change]:
        """See the port. "From now on" is before every later call of this instance, not at the
        first iteration: a listing asked for afterwards shows all that the watch won't. Against
        other instances' writes it is somewhere between this call and the answer to the next.

        Iterating raises StoreError where the watcher fell too far behind, or begins further back
        than the log goes (the newest 2,048 changes): list again, and watch from there.
        """
        watch = Watch(prefix)
        loop = asyncio.get_running_loop()
        self._submit(
            lambda database: self._begin(loop, database, watch, since_revision),
            loop.create_future(),  # Nobody waits for it: what goes wrong, the watch says.
        )
        return watch

    async def _perform(self, function: Callable[[Database], T]) -> T:
        done: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._submit(function, done)
        try:
            async with asyncio.timeout(self._operation_timeout_s):
                return await done
        except TimeoutError:
            raise StoreError(
                f"{self._path}: no answer within {self._operation_timeout_s:g} s; "
                "whether a write was carried out is unknown"
            ) from None

    def _submit(self, function: Callable[[Database], Any], done: asyncio.Future[Any]) -> None:
        if self._ended is None:
            raise StoreClosed(f"{self._path}: the store is not open")
        if self._jobs.qsize() >= _JOBS_LIMIT:
            raise StoreError(f"{self._path}: {_JOBS_LIMIT} calls are waiting; nothing was written")
        self._jobs.put((function, done))

    # --- the thread --------------------------------------------------------------------------

    def _run(
        self,
        loop: asyncio.AbstractEventLoop,
        opened: asyncio.Future[None],
        ended: asyncio.Future[None],
    ) -> None:
        jobs = self._jobs
        # A loop that is closed before its store has nobody left to be told.
        with contextlib.suppress(RuntimeError):
            try:
                database = Database(self._path, self._busy_timeout_s)
            except Exception as error:
                loop.call_soon_threadsafe(_settle, opened, None, error)
            else:
                loop.call_soon_threadsafe(_settle, opened, None, None)
                try:
                    self._serve(loop, jobs, database)
                finally:
                    database.close()
                    for reference in self._watches:
                        loop.call_soon_threadsafe(_end, reference)
                    self._watches = []
            loop.call_soon_threadsafe(_settle, ended, None, None)

    def _serve(
        self, loop: asyncio.AbstractEventLoop, jobs: queue.SimpleQueue[_Job | None], db: Database
    ) -> None:
        while True:
            idle = False
            try:
                job = jobs.get(timeout=self._watch_poll_s if self._watches else _IDLE_S)
            except queue.Empty:
                idle = True
            else:
                if job is None:
                    break
                self._carry_out(loop, db, *job)
                job = None  # It may hold the last reference to a watch.
            self._publish(loop, db)
            if idle or jobs.empty():
                db.housekeep()

    def _carry_out(
        self,
        loop: asyncio.AbstractEventLoop,
        database: Database,
        function: Callable[[Database], Any],
        done: asyncio.Future[Any],
    ) -> None:
        if done.cancelled():
            return
        result, error = None, None
        try:
            result = function(database)
        except Exception as caught:
            error = caught
        loop.call_soon_threadsafe(_settle, done, result, error)

    def _begin(
        self,
        loop: asyncio.AbstractEventLoop,
        database: Database,
        watch: Watch,
        since_revision: int | None,
    ) -> None:
        """Add a watch, first giving it what was published before it came."""
        reference = weakref.ref(watch)
        try:
            if not self._watches:
                self._seen_data_version = database.data_version()
                self._seen_revision = database.revision()
            else:
                self._publish(loop, database)
            if since_revision is not None:
                missed = [
                    change
                    for change in database.changes_since(since_revision)
                    if change.revision <= self._seen_revision
                ]
                loop.call_soon_threadsafe(_offer, reference, missed)
        except StoreError as error:
            loop.call_soon_threadsafe(_fail, reference, error)
        else:
            self._watches.append(reference)

    def _publish(self, loop: asyncio.AbstractEventLoop, database: Database) -> None:
        """Give every watch the changes since the last time, by any process."""
        self._watches = [ref for ref in self._watches if (w := ref()) is not None and not w.over]
        if not self._watches:
            return
        try:
            data_version = database.data_version()
            if (
                data_version == self._seen_data_version
                and database.own_revision <= self._seen_revision
            ):
                return
            changes = database.changes_since(self._seen_revision)
        except StoreError as error:
            for reference in self._watches:
                loop.call_soon_threadsafe(_fail, reference, error)
            self._watches = []
            return
        self._seen_data_version = data_version
        if changes:
            self._seen_revision = changes[-1].revision
            for reference in self._watches:
                loop.call_soon_threadsafe(_offer, reference, changes)


def _settle(future: asyncio.Future[Any], result: object, error: Exception | None) -> None:
    if future.done():
        return
    if error is None:
        future.set_result(result)
    else:
        future.set_exception(error)


def _offer(reference: weakref.ref[Watch], changes: Sequence[Change]) -> None:
    if (watch := reference()) is not None:
        watch.offer(changes)


def _fail(reference: weakref.ref[Watch], error: StoreError) -> None:
    if (watch := reference()) is not None:
        watch.fail(StoreError(str(error)))


def _end(reference: weakref.ref[Watch]) -> None:
    if (watch := reference()) is not None:
        watch.end()
