"""Blocking work off the event loop, with nothing leaked when the waiting task is cancelled."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")


async def offload(
    function: Callable[[], Result], *, undo: Callable[[Result], None] | None = None
) -> Result:
    """Run `function` in a thread. If we are cancelled meanwhile, `undo` gets its result later.

    A thread can't be interrupted, so its result (a process, descriptors) may come when nobody
    waits any more; `undo` is called from the event loop and must not block.
    """
    work = asyncio.get_running_loop().run_in_executor(None, function)
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        work.add_done_callback(lambda done: _undo(done, undo))
        raise


def _undo(done: asyncio.Future[Result], undo: Callable[[Result], None] | None) -> None:
    if done.cancelled() or done.exception() is not None or undo is None:
        return
    undo(done.result())
