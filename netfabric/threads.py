"""Calls that block, off the event loop, bounded in time and undone where nobody waits any more."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Final, TypeVar

from migrator.errors import FabricError

KERNEL_TIMEOUT_S: Final = 10.0
"""For one conversation with the kernel: milliseconds, unless something else holds its lock."""

_log = logging.getLogger(__name__)
_T = TypeVar("_T")
_undoings: Final[set[asyncio.Task[None]]] = set()


async def in_thread(call: Callable[[], _T], undo: Callable[[_T], None] | None = None) -> _T:
    """Run `call` in a thread, bounded. Whoever gives up waiting gets its result undone, in a thread
    as well: what talks to the kernel runs an event loop of its own, which it can't in ours.
    """
    task = asyncio.ensure_future(asyncio.to_thread(call))
    try:
        async with asyncio.timeout(KERNEL_TIMEOUT_S):
            return await asyncio.shield(task)
    except (asyncio.CancelledError, TimeoutError) as error:
        task.add_done_callback(lambda done: _abandoned(done, undo))
        if isinstance(error, asyncio.CancelledError):
            raise
        raise FabricError(f"the kernel took over {KERNEL_TIMEOUT_S:.0f} s") from error


def _abandoned(task: asyncio.Future[_T], undo: Callable[[_T], None] | None) -> None:
    if task.cancelled():
        return
    if (error := task.exception()) is not None:
        _log.info("a network call that was given up failed: %s", error)
    elif undo is not None:
        result = task.result()
        undoing = asyncio.ensure_future(asyncio.to_thread(undo, result))
        undoing.add_done_callback(_undone)
        _undoings.add(undoing)


def _undone(undoing: asyncio.Task[None]) -> None:
    _undoings.discard(undoing)
    if not undoing.cancelled() and (error := undoing.exception()) is not None:
        _log.error("a network call that was given up can't be undone: %s", error)
