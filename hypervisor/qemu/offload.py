"""Blocking work off the event loop, with nothing leaked when the waiting task is cancelled.

offload             what asks the kernel alone: the event loop's own threads
offload_to_disk     what may hang with the state directory's disk: threads of its own
offload_or_undone   the same; cancelled, it raises only when what it did is undone
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from typing import Final, TypeVar

from migrator.own_threads import in_own_thread

Result = TypeVar("Result")

DISK: Final = "qemu's state directory"
"""Whose threads those are."""
UNDO_TIMEOUT_S: Final = 30.0
"""From SIGKILL to the end of a process that has just begun: it may be in an uninterruptible I/O."""

log = logging.getLogger(__name__)


async def offload(
    function: Callable[[], Result], *, undo: Callable[[Result], None] | None = None
) -> Result:
    """Run `function` in a thread. If we are cancelled meanwhile, `undo` gets its result later.

    A thread can't be interrupted, so its result (a process, descriptors) may come when nobody
    waits any more; `undo` is called from the event loop and must not block.
    """
    return await _result(asyncio.get_running_loop().run_in_executor(None, function), undo)


async def offload_to_disk(
    function: Callable[[], Result],
    *,
    undo: Callable[[Result], None] | None = None,
    where: str = DISK,
) -> Result:
    """As `offload`, for what reads or writes files: were it to hang with their disk, it would keep
    a thread that the heartbeat and the ends of guests need. `where`: which disk it is.
    """
    return await _result(in_own_thread(where, function), undo)


async def _result(work: asyncio.Future[Result], undo: Callable[[Result], None] | None) -> Result:
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        work.add_done_callback(lambda done: _undo(done, undo))
        raise


async def offload_or_undone(
    function: Callable[[], Result], undo: Callable[[Result], None], what: str
) -> Result:
    """As `offload_to_disk`; but if we are cancelled, it raises only when the result was undone.

    For what must not be there any more when somebody makes it anew. `undo` may block; it is waited
    for within UNDO_TIMEOUT_S.
    """
    work = in_own_thread(DISK, function)
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        undoing = asyncio.create_task(_undone(work, undo, what))
        deadline_s = asyncio.get_running_loop().time() + UNDO_TIMEOUT_S
        while not undoing.done():
            left_s = deadline_s - asyncio.get_running_loop().time()
            if left_s <= 0:
                log.error("%s isn't undone %g s after it was given up", what, UNDO_TIMEOUT_S)
                break
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait({undoing}, timeout=left_s)
        raise


async def _undone(work: asyncio.Future[Result], undo: Callable[[Result], None], what: str) -> None:
    try:
        result = await work
    except Exception:
        return  # It failed, and left nothing.
    try:
        await in_own_thread(what, lambda: undo(result))
    except Exception:
        log.exception("%s can't be undone", what)


def _undo(done: asyncio.Future[Result], undo: Callable[[Result], None] | None) -> None:
    if done.cancelled() or done.exception() is not None or undo is None:
        return
    undo(done.result())
