"""Work that may hang with a storage server: in a thread, or in a process, but never for ever.

bounded(work)      a thread of the storage's own; a late result is undone when it comes at last
run_program(...)   a child process, killed where it is late (`migrator.programs`)

A call that is given up keeps its thread until the storage lets go of it. From so many on
(`GIVEN_UP_MAX`) further ones fail without being tried, so that nobody waits behind them.
"""

from __future__ import annotations

import asyncio
import collections
import errno
import logging
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Final, Generic, TypeVar

from migrator import programs
from migrator.errors import StorageError, TooLargeError, words
from migrator.own_threads import THREADS_MAX, in_own_thread

CALL_TIMEOUT_S: Final = 30.0
"""For a call on a few small files. A file server that takes longer is down."""
TOOL_TIMEOUT_S: Final = 60.0
GIVE_UP_WAIT_S: Final = 5.0
GIVEN_UP_MAX: Final = THREADS_MAX
COPIES: Final = ", copies"
"""As `kind`: what takes as long as there are bytes; nothing else waits behind it."""

_log = logging.getLogger(__name__)
_T = TypeVar("_T")


class GivenUp:
    """Calls that nobody waits for any more and that go on: how many, by what they wait for.

    From any thread.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: collections.Counter[str] = collections.Counter()

    def refuse(self, where: str) -> None:
        """StorageError from GIVEN_UP_MAX on."""
        count = self._counts[where]
        if count >= GIVEN_UP_MAX:
            raise StorageError(f"{where}: its storage hangs; {count} calls wait for it")

    def add(self, where: str) -> None:
        with self._lock:
            self._counts[where] += 1

    def remove(self, where: str) -> None:
        """It has come back."""
        with self._lock:
            self._counts[where] -= 1
            if not self._counts[where]:
                del self._counts[where]


given_up_calls: Final = GivenUp()


class _Call(Generic[_T]):
    """One piece of work in its thread, and what becomes of it where nobody waits any more."""

    def __init__(
        self,
        work: Callable[[], _T],
        where: str,
        undo: Callable[[_T], None] | None,
        given_up: threading.Event,
    ) -> None:
        self._work = work
        self._where = where
        self._undo = undo
        self._given_up = given_up
        self._lock = threading.Lock()
        self._results: list[_T] = []
        self._runs = False
        self._counted = False

    def run(self) -> _T:
        """In the thread."""
        with self._lock:
            if self._given_up.is_set():
                raise StorageError(f"{self._where}: it was given up before its turn")
            self._runs = True
        try:
            result = self._work()
            with self._lock:
                self._results.append(result)
                late = self._given_up.is_set()
            if late and self._undo is not None:
                self._undo(result)
            return result
        finally:
            with self._lock:
                self._runs = False
                if self._counted:
                    given_up_calls.remove(self._where)

    async def give_up(self) -> None:
        """From the event loop, once."""
        with self._lock:
            in_time = list(self._results)
            self._given_up.set()
            self._counted = self._runs
            if self._counted:
                given_up_calls.add(self._where)
        if in_time and self._undo is not None:
            undo = self._undo
            await tidy(self._where, lambda: undo(in_time[0]))


async def bounded(
    work: Callable[[], _T],
    where: str,
    *,
    timeout_s: float = CALL_TIMEOUT_S,
    undo: Callable[[_T], None] | None = None,
    given_up: threading.Event | None = None,
    kind: str = "",
) -> _T:
    """Run `work` in a thread, bounded; StorageError for what the file system refuses.

    `where` ("pool web") begins the messages, and has threads of its own; each `kind` of work, too.
    Cancelled or late: `given_up` is set, and a result that comes nevertheless is undone. It is
    waited for, but not for ever: the thread may hang with its file server.
    """
    given_up_calls.refuse(where)
    call = _Call(work, where, undo, given_up or threading.Event())
    try:
        task = in_own_thread(f"{where}{kind}", call.run)
        async with asyncio.timeout(timeout_s):
            return await asyncio.shield(task)
    except (asyncio.CancelledError, TimeoutError) as error:
        task.add_done_callback(_log_late)
        await call.give_up()
        await asyncio.wait({task}, timeout=GIVE_UP_WAIT_S)
        if isinstance(error, asyncio.CancelledError):
            raise
        raise StorageError(f"{where}: no answer in {timeout_s:.0f} s") from error
    except OSError as error:
        raise explained(where, error) from error


async def tidy(where: str, work: Callable[[], None]) -> None:
    """Undo something in a thread, for at most GIVE_UP_WAIT_S; what it raises is logged."""
    task = in_own_thread(where, work)
    task.add_done_callback(_log_late)
    await asyncio.wait({task}, timeout=GIVE_UP_WAIT_S)


def explained(where: str, error: OSError) -> StorageError:
    """A StorageError for an operator."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StorageError(f"{where} is full: {error.strerror}")
    if error.errno == errno.EFBIG:
        return TooLargeError(f"{where}: {words(error)}")  # Without the half-made file.
    reason = words(error) if error.filename is None else f"{words(error)} ({error.filename})"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return StorageError(f"{where}: this agent may not: {reason}")
    return StorageError(f"{where}: {reason}")


async def run_program(
    where: str,
    command: Sequence[str],
    *,
    timeout_s: float = TOOL_TIMEOUT_S,
    stdin: bytes = b"",
    environment: Mapping[str, str] | None = None,
    with_group: bool = False,
) -> bytes:
    """Run a program to its end and return what it printed. StorageError with its last words.

    `with_group`: also to the end of what it began (`programs.run`).
    """
    what = " ".join([os.path.basename(command[0]), *command[1:2]])  # noqa: PTH119 - Not a path.
    try:
        ended = await programs.run(
            command,
            stdin=stdin,
            timeout_s=timeout_s,
            environment=environment,
            with_group=with_group,
        )
    except TimeoutError as error:
        raise StorageError(f"{where}: {what} took over {timeout_s:.0f} s") from error
    except OSError as error:
        raise StorageError(f"{where}: can't run {command[0]}: {error.strerror}") from error
    if ended.status != 0:
        detail = ended.err.decode(errors="replace").strip() or f"status {ended.status}"
        if os.strerror(errno.ENOSPC) in detail:
            raise StorageError(f"{where} is full: {what}: {detail}")
        if (too_large := os.strerror(errno.EFBIG)) in detail:
            raise TooLargeError(f"{where}: {too_large}")
        raise StorageError(f"{where}: {what} failed: {detail}")
    return ended.out


def _log_late(task: asyncio.Future[_T]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        _log.info("a storage call that was given up failed: %s", error)
