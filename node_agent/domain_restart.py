"""Domains whose hypervisor died under them: started again here, from their disks.

Only where nobody asked for the end: a guest that powered itself off, a stop and a SIGTERM don't
count, and neither does an end that no agent saw (it may have been a power-off). Three times within
ten minutes; then the domain stays stopped, for whatever kills it would kill it again.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Final

from migrator.errors import FerryError
from migrator.model import DomainName
from migrator.ports import DomainEvent
from node_agent.events import EventKind, EventLog

log = logging.getLogger(__name__)

TRIES: Final = 3
WITHIN_S: Final = 600.0


class CrashRestarts:
    """Which domains crashed, and how often. `start` is how one is started."""

    def __init__(
        self,
        start: Callable[[DomainName], Awaitable[object]] | None,
        events: EventLog,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Without `start` nothing is ever started again."""
        self._start = start
        self._events = events
        self._clock = clock
        self._crashed: set[DomainName] = set()
        self._starts: dict[DomainName, deque[float]] = {}

    def note(self, event: DomainEvent) -> None:
        """An EXITED event."""
        (self._crashed.add if event.crashed else self._crashed.discard)(event.domain)

    def take(self, domain: DomainName) -> bool:
        """Whether it crashed; forgets it. Call it when the domain's record has been settled."""
        crashed = domain in self._crashed
        self._crashed.discard(domain)
        return crashed and self._start is not None

    async def start_again(self, domain: DomainName) -> None:
        """Start it, unless that was tried too often. Errors are logged, and stand in the events."""
        if self._start is None:
            return
        tried = self._starts.setdefault(domain, deque())
        now = self._clock()
        while tried and tried[0] < now - WITHIN_S:
            tried.popleft()
        if len(tried) >= TRIES:
            self._events.emit(
                EventKind.DOMAIN_START_FAILED,
                f"domain {domain} was started again {TRIES} times in {WITHIN_S / 60:.0f} minutes, "
                "and its hypervisor died again; it is left stopped",
                domain=domain,
            )
            return
        tried.append(now)
        try:
            await self._start(domain)
        except FerryError as error:
            log.warning("domain %s crashed and could not be started again: %s", domain, error)
