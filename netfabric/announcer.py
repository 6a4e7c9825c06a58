"""The repeats of an announcement: one owned background task a domain.

One announcement may be lost, or arrive while a switch is still bringing a port up, so it is said
again with growing gaps:

    announce() ── round ──20 ms── round ──50 ms── round ... ──1.6 s── round   (then it ends)

The first round is the caller's; this module runs the others. A new announcement of the same
domain, `silence` or `close` ends the running one. A failed round is logged, not raised: the next
one follows, and the list of gaps is the bound.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

from migrator.errors import FabricError
from migrator.model import DomainName

GAPS_S: Final = (0.02, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6)
"""Between rounds. Together 3.2 s: spanning-tree edge ports and bonding need under 2 s."""

_log = logging.getLogger(__name__)


class Announcer:
    """Owns the repeat tasks. Belongs to one event loop."""

    def __init__(self, gaps_s: Sequence[float] = GAPS_S) -> None:
        self._gaps_s = tuple(gaps_s)
        self._tasks: dict[DomainName, asyncio.Task[None]] = {}

    @property
    def active(self) -> frozenset[DomainName]:
        """The domains that are still being announced."""
        return frozenset(self._tasks)

    async def repeat(self, domain: DomainName, once_more: Callable[[], Awaitable[None]]) -> None:
        """Run `once_more` after each gap, in the background, in place of what ran before."""
        await self.silence(domain)
        if not self._gaps_s:
            return
        task = asyncio.create_task(self._run(domain, once_more), name=f"announce {domain}")
        self._tasks[domain] = task
        task.add_done_callback(lambda done: self._forget(domain, done))

    async def silence(self, domain: DomainName) -> None:
        """End the domain's repeats and wait until they have ended. Idempotent."""
        task = self._tasks.pop(domain, None)
        if task is not None:
            task.cancel()
            await asyncio.wait({task})

    async def close(self) -> None:
        """End every repeat. Idempotent."""
        tasks = set(self._tasks.values())
        self._tasks.clear()
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    async def _run(self, domain: DomainName, once_more: Callable[[], Awaitable[None]]) -> None:
        for gap_s in self._gaps_s:
            await asyncio.sleep(gap_s)
            try:
                await once_more()
            except FabricError as error:
                _log.warning("announcement of domain %s, a repeat: %s", domain, error)

    def _forget(self, domain: DomainName, task: asyncio.Task[None]) -> None:
        if self._tasks.get(domain) is task:
            del self._tasks[domain]
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("announcement of domain %s ended early", domain, exc_info=error)
