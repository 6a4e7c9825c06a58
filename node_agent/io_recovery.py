"""A guest that a disk's error paused goes on by itself once the storage is back.

QEMU stops a guest whose disk failed (werror=stop), and keeps the request: the guest sees a wait,
not an error. So all it takes is to resume it, again and again until the disk answers:

    IO_ERROR ──► wait ──► this node owns it? no migration has it? still paused by the disk?
                  ▲  yes: does the storage answer? ──► resume ──► it runs, or IO_ERROR again
                  └────── a little longer each time, at most 5 s

A hypervisor that doesn't answer meanwhile is asked again: it may wait for the same storage, and
says nothing anew when it is back.

Only the owner's agent does that, by the record, under the domain's lock: a copy that a fence has
shut out has the same error, and must not run. While a migration has the domain nothing is done; it
comes again when the migration lets go.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Final

from migrator.errors import ConflictError, FerryError
from migrator.model import DomainName, DomainState
from migrator.ports import DomainEvent, DomainEventKind, HypervisorDriver
from node_agent.domain_launch import LaunchBuilder
from node_agent.domain_locks import DomainLocks
from node_agent.domain_ownership import DomainOwnership
from node_agent.domain_records import DomainRecords
from node_agent.events import EventKind, EventLog

log = logging.getLogger(__name__)

FIRST_PAUSE_S: Final = 0.5
LONGEST_PAUSE_S: Final = 5.0
STEADY_S: Final = 10.0
"""Who ran for so long since the last error begins with a short pause again."""
TRY_S: Final = 20.0
"""One try, the question to the storage included."""


class IoRecovery:
    """See the module. `open` also looks after guests that the last agent left paused."""

    def __init__(
        self,
        *,
        hypervisor: HypervisorDriver,
        launches: LaunchBuilder,
        ownership: DomainOwnership,
        records: DomainRecords,
        locks: DomainLocks,
        events: EventLog,
    ) -> None:
        self._hypervisor = hypervisor
        self._launches = launches
        self._ownership = ownership
        self._records = records
        self._locks = locks
        self._events = events
        self._watching: dict[DomainName, asyncio.Task[None]] = {}
        self._again: set[DomainName] = set()
        self._pauses: dict[DomainName, tuple[float, float]] = {}
        """The next pause, and the loop's time of the last resume."""
        self._unsubscribe: list[Callable[[], None]] = []

    async def open(self) -> None:
        """Begin. Never raises: a hypervisor that doesn't answer now is heard later."""
        self._unsubscribe = [
            self._hypervisor.subscribe(self._on_event),
            self._locks.on_release(self._watch),
        ]
        for status in await self._hypervisor.list_domains():
            if status.state in (DomainState.IO_ERROR, DomainState.UNKNOWN):
                self._watch(DomainName(status.name))

    async def close(self) -> None:
        """Guests stay as they are. Idempotent."""
        for unsubscribe in self._unsubscribe:
            unsubscribe()
        self._unsubscribe = []
        while self._watching:
            self._again.clear()
            tasks = tuple(self._watching.values())
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _on_event(self, event: DomainEvent) -> None:
        if event.kind is DomainEventKind.IO_ERROR:
            self._watch(event.domain)

    def _watch(self, domain: DomainName) -> None:
        if domain in self._watching:
            self._again.add(domain)  # The one that is at it may have resumed it just before.
            return
        task = asyncio.create_task(self._bring_back(domain), name=f"io-error-{domain}")
        self._watching[domain] = task

        def ended(_: asyncio.Task[None]) -> None:
            del self._watching[domain]
            if domain in self._again:
                self._again.discard(domain)
                self._watch(domain)

        task.add_done_callback(ended)

    async def _bring_back(self, domain: DomainName) -> None:
        """Until it runs, or isn't this node's. Bounded by the guest's stay in this state."""
        reason = ""
        while True:
            state = (await self._hypervisor.inspect(domain)).state
            if state is DomainState.UNKNOWN:
                if self._locks.migration_of(domain) is not None:
                    return  # Its end calls us again.
                await asyncio.sleep(FIRST_PAUSE_S)
                continue
            if state is not DomainState.IO_ERROR:
                return
            await asyncio.sleep(self._next_pause_s(domain))
            try:
                async with asyncio.timeout(TRY_S):
                    if await self._try(domain):
                        return
            except ConflictError as error:
                if self._locks.migration_of(domain) is not None:
                    return  # Its end calls us again.
                log.info("domain %s: %s", domain, error)
            except (FerryError, TimeoutError) as error:
                if str(error) != reason:
                    reason = str(error)
                    log.warning("domain %s is still paused by a disk's error: %s", domain, reason)

    async def _try(self, domain: DomainName) -> bool:
        """Whether it runs, or needs nothing. Errors: it does still need it."""
        async with self._locks.hold(domain, "resume after a disk's error"):
            record = await self._records.get(domain)
            try:
                await self._ownership.owned_here(domain)
            except ConflictError:
                return True  # A copy that must not run; ending it is another's business.
            state = (await self._hypervisor.inspect(domain)).state
            if state is not DomainState.IO_ERROR:
                return state is not DomainState.UNKNOWN
            await self._launches.newest_fence(record.spec)  # Does the storage answer at all?
            await self._hypervisor.resume(domain)
        loop = asyncio.get_running_loop()
        self._pauses[domain] = (self._pauses[domain][0], loop.time())
        self._events.emit(
            EventKind.DOMAIN_RESUMED,
            f"domain {domain} was resumed after a disk's error",
            domain=domain,
        )
        return True

    def _next_pause_s(self, domain: DomainName) -> float:
        now_s = asyncio.get_running_loop().time()
        pause_s, resumed_at_s = self._pauses.get(domain, (FIRST_PAUSE_S, 0.0))
        if resumed_at_s and now_s - resumed_at_s > STEADY_S:
            pause_s = FIRST_PAUSE_S
        self._pauses[domain] = (min(2 * pause_s, LONGEST_PAUSE_S), resumed_at_s)
        return pause_s
