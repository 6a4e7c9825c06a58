"""An engine's commands in the background: each when the one before it has ended.

One that fails means that the engine is lost. Unlike the runner's lanes nothing is ended for what
comes later: an engine that is told to stop is told so in its turn.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any

from migrator.errors import FerryError

log = logging.getLogger(__name__)


class Turns:
    """See the module. `lost` hears what failed, and why; `patience_s` bounds `close`."""

    def __init__(self, name: str, lost: Callable[[str], None], patience_s: float) -> None:
        self._name = name
        self._lost = lost
        self._patience_s = patience_s
        self._last: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    def put(self, what: str, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Do it when all that was put before has ended, however that went."""
        before = self._last

        async def in_turn() -> None:
            if before is not None and not before.done():
                await asyncio.wait([before])
            try:
                await work
            except (FerryError, OSError) as error:  # OSError: no descriptors left, for example.
                self._lost(f"{what}: {error}")
            except Exception as error:  # A bug, or no thread is left: nobody shall wait for it.
                log.exception("%s: %s", self._name, what)
                self._lost(f"{what}: {type(error).__name__}: {error}")

        self._last = self.beside(in_turn())
        self._last.add_done_callback(lambda _: work.close())  # One that was ended before it began.
        return self._last

    def beside(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Do it now, whatever the turns are at."""
        task = asyncio.create_task(work, name=self._name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def drained(self) -> None:
        """Wait until all has ended; bounded by the work's own bounds."""
        while self._tasks:
            await asyncio.wait(set(self._tasks))

    async def close(self) -> None:
        """End all of it, and wait for that."""
        for task in tuple(self._tasks):
            task.cancel()
        if self._tasks:
            await asyncio.wait(set(self._tasks), timeout=self._patience_s)
