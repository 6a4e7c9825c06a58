"""Work that may hang with a storage server: in a thread, or in a process, but never for ever.

bounded(work)      a thread; a late result is undone when it comes at last
run_program(...)   a child process; it is dead when the call returns or raises
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Final, TypeVar

from migrator.errors import StorageError, words

CALL_TIMEOUT_S: Final = 30.0
"""For a call on a few small files. A file server that takes longer is down."""
TOOL_TIMEOUT_S: Final = 60.0
GIVE_UP_WAIT_S: Final = 5.0

_log = logging.getLogger(__name__)
_T = TypeVar("_T")


async def bounded(
    work: Callable[[], _T],
    where: str,
    *,
    timeout_s: float = CALL_TIMEOUT_S,
    undo: Callable[[_T], None] | None = None,
    given_up: threading.Event | None = None,
) -> _T:
    """Run `work` in a thread, bounded; StorageError for what the file system refuses.

    `where` ("pool web") begins the messages. Cancelled or late: `given_up` is set, and a result
    that comes nevertheless is undone. It is waited for, but not for ever: the thread may hang with
    its file server.
    """
    given_up = given_up or threading.Event()
    order = threading.Lock()
    results: list[_T] = []

    def run() -> _T:
        result = work()
        with order:
            results.append(result)
            late = given_up.is_set()
        if late and undo is not None:
            undo(result)
        return result

    task = asyncio.ensure_future(asyncio.to_thread(run))
    try:
        async with asyncio.timeout(timeout_s):
            return await asyncio.shield(task)
    except (asyncio.CancelledError, TimeoutError) as error:
        with order:
            in_time = list(results)
            given_up.set()
        task.add_done_callback(_log_late)
        if in_time and undo is not None:
            await asyncio.shield(asyncio.to_thread(undo, in_time[0]))
        await asyncio.wait({task}, timeout=GIVE_UP_WAIT_S)
        if isinstance(error, asyncio.CancelledError):
            raise
        raise StorageError(f"{where}: no answer in {timeout_s:.0f} s") from error
    except OSError as error:
        raise explained(where, error) from error


def explained(where: str, error: OSError) -> StorageError:
    """A StorageError for an operator."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StorageError(f"{where} is full: {error.strerror}")
    reason = words(error) if error.filename is None else f"{words(error)} ({error.filename})"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return StorageError(f"{where}: this agent may not: {reason}")
    return StorageError(f"{where}: {reason}")


async def run_program(
    where: str,
    command: Sequence[str],
    *,
    timeout_s: float = TOOL_TIMEOUT_S,
    stdin: bytes | None = None,
    environment: Mapping[str, str] | None = None,
) -> bytes:
    """Run a program to its end and return what it printed. StorageError with its last words."""
    what = " ".join([os.path.basename(command[0]), *command[1:2]])  # noqa: PTH119 - Not a path.
    try:
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.DEVNULL if stdin is None else asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=None if environment is None else dict(environment),
        )
    except OSError as error:
        raise StorageError(f"{where}: can't run {command[0]}: {error.strerror}") from error
    try:
        async with asyncio.timeout(timeout_s):
            printed, complaint = await process.communicate(stdin)
    except TimeoutError as error:
        raise StorageError(f"{where}: {what} took over {timeout_s:.0f} s") from error
    finally:
        if process.returncode is None:
            process.kill()
            await asyncio.shield(process.wait())
    if process.returncode != 0:
        detail = complaint.decode(errors="replace").strip() or f"status {process.returncode}"
        raise StorageError(f"{where}: {what} failed: {detail}")
    return printed


def _log_late(task: asyncio.Future[_T]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        _log.info("a storage call that was given up failed: %s", error)
