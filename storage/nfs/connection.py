"""One export, used from the event loop: a thread of its own, and a new one when it hangs.

    call(work) ──► queue ──► thread: work(export) ──► result
                      │ no answer in time: the thread is given up with its connection (libnfs ends
                      └ its wait by itself soon), and the next call gets a new one

libnfs isn't for two threads at once, and a connection whose server was away is best made anew; so a
broken one is never used again.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

from migrator.errors import FerryError, StorageError
from storage.bounded import explained, given_up_calls
from storage.nfs.libnfs import Export, NfsError
from storage.outage import Outage

_BROKEN: Final = frozenset({errno.EFAULT, errno.EINTR, errno.ETIMEDOUT, errno.EIO, errno.EPIPE})
"""After these nothing is known of the connection."""
_REFUSED: Final = frozenset({errno.ENOENT, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.ENOMEM})
"""What a server that is there may say of a mount, or this machine of itself."""
_OF_THE_SERVER: Final = "NFS3ERR"
"""In libnfs's words where the server has answered, with an error of its own."""
_SAYS_NOTHING: Final = "nfs_service failed"

_log = logging.getLogger(__name__)
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Server:
    """Which one, for messages; and since when it doesn't answer."""

    address: str
    export: str
    outage: Outage = field(default_factory=Outage)

    def explained(self, where: str, error: NfsError) -> StorageError:
        """A StorageError for an operator."""
        said = error.strerror or ""
        mounting = error.filename == f"{self.address}:{self.export}"
        away = error.errno in _BROKEN or (mounting and error.errno not in _REFUSED)
        if away and _OF_THE_SERVER not in said:
            reason = "the connection broke" if _SAYS_NOTHING in said else said
            return StorageError(
                f"{where}: NFS server {self.address} (export {self.export}) can't be reached: "
                f"{reason}{self.outage.failed()}. Is it up, and do its ports for rpcbind (111), "
                "mount and nfs (2049) let this node in?"
            )
        self.outage.answered()
        if mounting and error.errno in (errno.ENOENT, errno.EACCES, errno.EPERM):
            return StorageError(
                f"{where}: NFS server {self.address} doesn't let this node mount {self.export} "
                f"({said}): does it export that, and to this node?"
            )
        return explained(where, error)


class Connection:
    """See the module. `where` ("pool web") begins the messages. `close` it."""

    def __init__(self, where: str, server: Server, connect: Callable[[], Export]) -> None:
        self._where = where
        self._server = server
        self._connect = connect
        self._worker: _Worker | None = None

    async def call(self, work: Callable[[Export], _T], *, timeout_s: float, tries: int = 1) -> _T:
        """Run `work` in the thread. StorageError; a FerryError of `work` comes as it is.

        `tries` above 1 only where repeating is harmless: a connection that broke while nobody
        used it shows only when it is used. All tries together take `timeout_s`.
        """
        deadline_s = asyncio.get_running_loop().time() + timeout_s
        for left in range(tries - 1, -1, -1):
            left_s = deadline_s - asyncio.get_running_loop().time()
            try:
                result = await self._call(work, left_s / (left + 1))
            except NfsError as error:
                if left == 0 or error.errno not in _BROKEN:
                    raise self._server.explained(self._where, error) from error
            except FerryError as error:
                if type(error) is not StorageError:
                    self._server.outage.answered()
                raise
            else:
                self._server.outage.answered()
                return result
        raise AssertionError("the last try returns or raises")

    async def _call(self, work: Callable[[Export], _T], timeout_s: float) -> _T:
        given_up_calls.refuse(self._where)
        if self._worker is None or self._worker.broken:
            self._worker = _Worker(self._where, self._connect)
        worker = self._worker
        future = worker.put(work)
        try:
            async with asyncio.timeout(timeout_s):
                result: _T = await future
                return result
        except TimeoutError:
            worker.give_up()
            raise NfsError(errno.ETIMEDOUT, f"no answer in {timeout_s:.0f} s") from None
        except asyncio.CancelledError:
            worker.give_up()  # What it is at may still happen; the next call must not wait for it.
            raise
        except NfsError as error:
            if error.errno in _BROKEN:
                worker.give_up()
            raise

    def another(self) -> Connection:
        """A new one to the same export."""
        return Connection(self._where, self._server, self._connect)

    def close(self) -> None:
        """End the thread once it is through. Idempotent."""
        if self._worker is not None:
            self._worker.end()
            self._worker = None


class _Worker:
    """A thread with a connection, which it makes at its first work."""

    def __init__(self, where: str, connect: Callable[[], Export]) -> None:
        self.broken = False
        self._where = where
        self._counted = False
        self._connect = connect
        self._work: queue.SimpleQueue[tuple[Callable[[Export], Any], asyncio.Future[Any]] | None]
        self._work = queue.SimpleQueue()
        self._loop = asyncio.get_running_loop()
        threading.Thread(target=self._run, name="nfs", daemon=True).start()

    def put(self, work: Callable[[Export], Any]) -> asyncio.Future[Any]:
        future = self._loop.create_future()
        self._work.put((work, future))
        return future

    def end(self) -> None:
        self.broken = True
        self._work.put(None)

    def give_up(self) -> None:
        """End it without waiting for what it is at."""
        if not self.broken:
            self._counted = True
            given_up_calls.add(self._where)
            self.end()

    def _run(self) -> None:
        export: Export | None = None
        while (item := self._work.get()) is not None:
            work, future = item
            if self.broken:
                self._tell(future, None, NfsError(errno.ETIMEDOUT, "the connection was given up"))
                continue
            try:
                if export is None:
                    export = self._connect()
                result = work(export)
            except (OSError, FerryError) as error:
                self._tell(future, None, error)
            except BaseException as error:
                _log.exception("a call to an NFS server failed")
                self._tell(future, None, StorageError(f"{type(error).__name__}: {error}"))
            else:
                self._tell(future, result, None)
        if export is not None:
            export.close()
        if self._counted:
            given_up_calls.remove(self._where)

    def _tell(self, future: asyncio.Future[Any], result: Any, error: BaseException | None) -> None:
        def tell() -> None:
            if future.done():
                return
            if error is not None:
                future.set_exception(error)
            else:
                future.set_result(result)

        with contextlib.suppress(RuntimeError):  # The loop has ended.
            self._loop.call_soon_threadsafe(tell)
