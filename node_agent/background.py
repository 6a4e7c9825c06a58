"""Tasks with an owner, who ends them: none goes on without it, and none is forgotten by asyncio.

Background    the one loop behind a service, from its `open` to its `close`
Asides        pieces of work that nobody waits for
uninterrupted what goes to its end though whoever awaits it is cancelled
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Coroutine
from typing import Any, TypeVar

from migrator.errors import FerryError

T = TypeVar("T")

log = logging.getLogger(__name__)


class Background:
    """One task at a time, which goes on until it is closed. Should it fail before that, the log has
    it at once: nobody else looks until then. Who closes it hears of it, too.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._task: asyncio.Task[None] | None = None

    @property
    def running(self) -> bool:
        """Whether it was started, and not closed."""
        return self._task is not None

    def start(self, work: Coroutine[Any, Any, None]) -> None:
        self._task = asyncio.create_task(work, name=self._name)
        self._task.add_done_callback(self._tell_failure)

    def _tell_failure(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("%s has failed, and doesn't go on", self._name, exc_info=error)

    async def close(self) -> None:
        """End it, and wait until it has. Idempotent. What it failed with is raised."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task


class Asides:
    """Any number of tasks. A FerryError of one goes to its owner's log."""

    def __init__(self, log: logging.Logger) -> None:
        self._log = log
        self.tasks: set[asyncio.Task[None]] = set()

    def add(self, work: Coroutine[Any, Any, None]) -> None:
        """Begin it."""
        task = asyncio.create_task(self._logged(work))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def _logged(self, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except FerryError as error:
            self._log.warning("%s", error)


async def uninterrupted(work: Coroutine[Any, Any, T]) -> T:
    """Await `work` to its end even if the caller is cancelled; then raise the cancellation."""
    task = asyncio.create_task(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError as error:
            if task.done():
                break
            cancelled = error
        except Exception:
            break  # The task's own; raised below.
    if cancelled is not None:
        with contextlib.suppress(Exception):
            task.result()
        raise cancelled
    return task.result()
