"""A guest that a disk's error paused goes on by itself once the storage is back.

QEMU stops a guest whose disk failed (werror=stop), and keeps the request: the guest sees a wait,
not an error. So all it takes is to resume it, again and again until the disk answers:

    IO_ERROR ──► wait ──► this node owns it? the storage answers?
                  ▲  yes: no migration has it? still paused by the disk? ──► resume ──► it runs
                  └────── a little longer each time, at most 5 s; or after another IO_ERROR

Only the owner's agent does that, by the record, under the domain's lock: a copy that a fence has
shut out has the same error, and must not run. It is watched all the same, until it is ended: the
record may be an older store's, which is put right later. While a migration has the domain nothing
is done; it comes again when the migration lets go.

A hypervisor that is silent says nothing about its guest: it is asked again while it lives.
A full pool may pause a guest every few seconds, for days: the event log is told of that once, and
once of its end.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Final

from migrator.errors import FerryError
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
"""Who ran for so long since the last error has recovered: the next error is another one."""
TRY_S: Final = 20.0
"""One try, the question to the storage included."""


class _Trouble:
    """One domain's, from the first error until it has run for STEADY_S."""

    def __init__(self, now_s: float) -> None:
        self.since_s = now_s
        """By the loop's clock, as `resumed_at_s`."""
        self.resumed_at_s = 0.0
        self.paused = True
        self.errors = 0
        self.resumes = 0
        self.pause_s = FIRST_PAUSE_S
        self.held_up = ""
        """Why it isn't resumed yet; "": it was tried, and failed again."""
        self.told_again = False

    def runs(self, now_s: float) -> None:
        self.paused, self.resumed_at_s = False, now_s

    def over(self, now_s: float) -> bool:
        return not self.paused and now_s - self.resumed_at_s > STEADY_S

    def next_pause_s(self) -> float:
        pause_s, self.pause_s = self.pause_s, min(2 * self.pause_s, LONGEST_PAUSE_S)
        return pause_s


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
        self._troubles: dict[DomainName, _Trouble] = {}
        self._steady: dict[DomainName, asyncio.TimerHandle] = {}
        """Those that run again after several tries, and when that is told."""
        self._unsubscribe: list[Callable[[], None]] = []

    async def open(self) -> None:
        """Begin. Never raises: a hypervisor that doesn't answer now is asked again."""
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
        for timer in self._steady.values():
            timer.cancel()
        self._steady.clear()
        while self._watching:
            self._again.clear()
            tasks = tuple(self._watching.values())
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def remark(self, domain: DomainName) -> str:
        """For an operator who sees that it is paused by a disk: what is done about it."""
        migration = self._locks.migration_of(domain)
        if migration is not None:
            return f"it is resumed once migration {migration} has let go of it"
        trouble = self._troubles.get(domain)
        if domain not in self._watching or trouble is None:
            return ""
        since_s = asyncio.get_running_loop().time() - trouble.since_s
        if trouble.held_up:
            return f"paused for {since_s:.0f} s, and not resumed yet: {trouble.held_up}"
        if trouble.resumes:
            times = "once" if trouble.resumes == 1 else f"{trouble.resumes} times"
            return f"resumed {times} in {since_s:.0f} s, and it failed again"
        return ""

    # --- what happens to a domain --------------------------------------------------------------

    def _on_event(self, event: DomainEvent) -> None:
        domain = event.domain
        if event.kind is DomainEventKind.EXITED:
            self._forget(domain)
        if event.kind is DomainEventKind.RESUMED and domain in self._troubles:  # By whomever.
            self._troubles[domain].runs(asyncio.get_running_loop().time())
        if event.kind is not DomainEventKind.IO_ERROR:
            return
        why = f" ({event.detail})" if event.detail else ""
        trouble = self._trouble(domain)
        trouble.errors += 1  # One for each request that failed.
        if trouble.errors == 1:
            self._tell_error(domain, f"it is paused: a disk failed{why}")
        elif trouble.resumes and not trouble.told_again:
            trouble.told_again = True
            self._tell_error(
                domain,
                f"a disk failed again{why}; it is resumed every {LONGEST_PAUSE_S:g} s until that "
                "works, and only that is told then",
            )
        self._watch(domain)

    def _tell_error(self, domain: DomainName, text: str) -> None:
        self._events.emit(EventKind.DOMAIN_IO_ERROR, f"domain {domain}: {text}", domain=domain)

    def _trouble(self, domain: DomainName) -> _Trouble:
        """The one that it is in, or begins now."""
        now_s = asyncio.get_running_loop().time()
        if (timer := self._steady.pop(domain, None)) is not None:
            timer.cancel()
        trouble = self._troubles.get(domain)
        if trouble is None or trouble.over(now_s):
            trouble = self._troubles[domain] = _Trouble(now_s)
        trouble.paused = True
        return trouble

    def _forget(self, domain: DomainName) -> None:
        self._troubles.pop(domain, None)
        if (timer := self._steady.pop(domain, None)) is not None:
            timer.cancel()

    def _watch(self, domain: DomainName) -> None:
        if domain in self._watching:
            self._again.add(domain)  # The one that is at it may have resumed it just before.
            return
        task = asyncio.create_task(self._bring_back(domain), name=f"io-error-{domain}")
        self._watching[domain] = task

        def ended(done: asyncio.Task[None]) -> None:
            del self._watching[domain]
            if not done.cancelled() and (error := done.exception()) is not None:
                log.error("domain %s may stay paused by a disk's error", domain, exc_info=error)
            if domain in self._again:
                self._again.discard(domain)
                self._watch(domain)

        task.add_done_callback(ended)

    async def _bring_back(self, domain: DomainName) -> None:
        """Until it runs. Bounded by the guest's stay in this state."""
        silent_s = FIRST_PAUSE_S
        while True:
            state = (await self._hypervisor.inspect(domain)).state
            if state is DomainState.UNKNOWN:  # It may be paused all the same: ask again.
                if self._locks.migration_of(domain) is not None:
                    return  # Its end calls us again.
                await asyncio.sleep(silent_s)
                silent_s = min(2 * silent_s, LONGEST_PAUSE_S)
                continue
            if state is not DomainState.IO_ERROR:
                return
            trouble = self._trouble(domain)
            await asyncio.sleep(trouble.next_pause_s())
            try:
                async with asyncio.timeout(TRY_S):
                    if await self._try(domain, trouble):
                        return
            except (FerryError, TimeoutError) as error:
                if self._locks.migration_of(domain) is not None:
                    return  # Its end calls us again.
                reason = str(error) or f"no answer in {TRY_S:g} s"
                if reason != trouble.held_up:
                    trouble.held_up = reason
                    log.warning("domain %s is still paused by a disk's error: %s", domain, reason)

    async def _try(self, domain: DomainName, trouble: _Trouble) -> bool:
        """Whether it runs, or needs nothing. Errors: it does still need it."""
        record = await self._records.get(domain)
        await self._ownership.owned_here(domain)
        # Does the storage answer at all? Not under the lock: who stops the domain need not wait.
        await self._launches.newest_fence(record.spec)
        async with self._locks.hold(domain, "resume after a disk's error"):
            await self._ownership.owned_here(domain)
            state = (await self._hypervisor.inspect(domain)).state
            if state is DomainState.UNKNOWN:
                return False
            if state is not DomainState.IO_ERROR:
                return True
            before = trouble.errors  # Another may come before the answer.
            trouble.runs(asyncio.get_running_loop().time())
            await self._hypervisor.resume(domain)
        self._note_resume(domain, trouble, runs=trouble.errors == before)
        return True

    def _note_resume(self, domain: DomainName, trouble: _Trouble, *, runs: bool) -> None:
        """`runs`: it has not failed again by now."""
        loop = asyncio.get_running_loop()
        trouble.held_up = ""
        trouble.resumes += 1
        if runs and trouble.resumes == 1:
            self._tell_resumed(domain, f"domain {domain} was resumed after a disk's error")
        elif runs:
            self._steady[domain] = loop.call_later(STEADY_S, self._tell_steady, domain, trouble)

    def _tell_steady(self, domain: DomainName, trouble: _Trouble) -> None:
        del self._steady[domain]
        for_s = trouble.resumed_at_s - trouble.since_s
        text = f"domain {domain} goes on after a disk's errors: {trouble.resumes} resumes"
        self._tell_resumed(domain, f"{text} in {for_s:.0f} s")

    def _tell_resumed(self, domain: DomainName, text: str) -> None:
        self._events.emit(EventKind.DOMAIN_RESUMED, text, domain=domain)
