"""A runner's lane: what belongs together is done in order, one at a time.

Unlike an engine's turns (`turns.py`) what runs can be ended for what comes next: an abort doesn't
wait for the switchover that it ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Coroutine
from typing import Any, Final

log = logging.getLogger(__name__)

_CLOSE_S: Final = 3.0
"""That what was ended may take to clean up."""


class Lane:
    """Runs one coroutine at a time, in order."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._waiting: deque[Coroutine[Any, Any, None]] = deque()
        self._task: asyncio.Task[None] | None = None

    def put(self, work: Coroutine[Any, Any, None]) -> None:
        self._waiting.append(work)
        if self._task is None:
            self._next()

    def clear(self) -> None:
        """End what runs, forget what waits."""
        while self._waiting:
            self._waiting.popleft().close()
        if self._task is not None:
            self._task.cancel()

    async def drained(self, timeout_s: float) -> None:
        """Wait until nothing runs or waits, for at most `timeout_s`."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while self._task is not None:
                    await asyncio.wait([self._task])
                    await asyncio.sleep(0)  # Its successor starts in its callback.

    async def close(self) -> None:
        self.clear()
        if self._task is not None:
            await asyncio.wait([self._task], timeout=_CLOSE_S)

    def _next(self) -> None:
        self._task = asyncio.create_task(self._waiting.popleft(), name=self._name)
        self._task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._task = None
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("%s failed", self._name, exc_info=error)
        if self._waiting:
            self._next()
