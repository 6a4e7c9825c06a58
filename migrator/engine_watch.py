"""Whether a post-copy's engine still answers.

That an engine has ended is told by the kernel. That it hangs (somebody's SIGSTOP, a deadlock, a
page of its own that its disk doesn't give back) is told by nobody, and its guest waits for pages.
So it is asked every few seconds. One answer alone may be late: a host that was suspended, or whose
cores are taken, has engines that say nothing for a moment.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final

PING_S: Final = 5.0
UNANSWERED_MAX: Final = 3
"""In a row; then it hangs. A guest has waited for its pages for that long."""


class EngineWatch:
    """Whoever owns it tells it what the engine says, and closes it."""

    def __init__(self, ask: Callable[[], bool], hangs: Callable[[float], Awaitable[None]]) -> None:
        """`ask`: False where there is no engine that could answer. `hangs`: told for how many
        seconds it has said nothing, and again each time that it says nothing for as long again.
        """
        self._ask = ask
        self._hangs = hangs
        self._answered = False
        self._task: asyncio.Task[None] | None = None

    def begin(self) -> None:
        """Idempotent."""
        if self._task is None:
            self._task = asyncio.create_task(self._watch(), name="engine-watch")

    def heard(self) -> None:
        """The engine has said something, whatever it was."""
        self._answered = True

    async def close(self) -> None:
        """Idempotent."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    async def _watch(self) -> None:
        unanswered = 0
        while True:
            self._answered = False
            asked = self._ask()
            await asyncio.sleep(PING_S)
            unanswered = 0 if self._answered or not asked else unanswered + 1
            if unanswered >= UNANSWERED_MAX:
                unanswered = 0
                await self._hangs(UNANSWERED_MAX * PING_S)
