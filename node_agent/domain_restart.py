"""Domains that were lost though they should run: started again here, from their disks.

    its hypervisor died, seen or not ───────────┐
    the node was rebooted, or lost power ──────┼─► wanted, on the disk ─► record STOPPED ─► start
    it was shut down, with its guests ─────────┤        ▲                     │ failed
    an agent died between here and there ──────┘        └──── a longer pause ─┘

Only where nobody asked for the end: a guest that powered itself off, a stop and a SIGTERM don't
count, nor does what becomes of the host while a domain is being stopped. A crash is known to the
driver until the domain is dealt with (`HypervisorDriver.crashed`), so it doesn't matter which agent
sees it. Of an end in this boot that none saw the driver says whether it is certain to be one; one
that may have been a power-off doesn't count either.

What is wanted is noted before the record says STOPPED (`restart_notes`), so that the next agent
goes on whenever this one dies. Whether a domain may still be started is the record's word alone: it
must be this node's, with the token under which the domain was lost, or the next one, which only a
start of this node's own can have won from it. So a domain that was taken over, or started, or moved
elsewhere meanwhile is left alone. What a migration has hold of is left to it first.

From `host_ends` on every end counts as the host's, and nothing is started: the next agent does,
which is the next boot's, or this one's where the host didn't go down after all.

A start that fails (the storage may be on its way up, too) is tried again, for 12 hours. A domain
that is started and lost again three times within ten minutes stays stopped, over agents' ends and
reboots: whatever kills it, and maybe the node with it, would do that again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Collection,
    Coroutine,
    Mapping,
    Sequence,
)
from typing import Any, Final

import msgspec

from migrator.errors import FerryError, StoreError
from migrator.model import DomainName, NodeName, OwnershipRecord, OwnershipState
from migrator.ports import DomainEvent
from node_agent.events import EventKind, EventLog
from node_agent.restart_notes import RestartNotes, RestartStore, Wanted

log = logging.getLogger(__name__)

TRIES: Final = 3
WITHIN_S: Final = 600.0
PARALLEL: Final = 4
"""Starts at the same time: a node with all its guests to start has its disks busy enough."""
PAUSE_S: Final = 5.0
"""After a start that failed; doubled from one to the next, up to PAUSE_S_MAX."""
PAUSE_S_MAX: Final = 300.0
GIVE_UP_S: Final = 12 * 3600.0
"""From the loss to the last try: who has gone without a domain for so long has seen to it."""


class RestartPolicy(msgspec.Struct, frozen=True, kw_only=True):
    """What a node starts again, and what it remembers it by."""

    boot_id: str
    """Which boot of the host this is."""
    store: RestartStore
    enabled: bool = True
    """False: what is lost stays stopped."""
    clock: Callable[[], float] = time.time
    """Wall clock, s: it may be wrong when the host boots, and be set by a day or a year then."""
    monotonic: Callable[[], float] = time.monotonic


class DomainRestarts:
    """See the module. `begin`, then `go_on`; everything in one event loop."""

    def __init__(
        self,
        node: NodeName,
        policy: RestartPolicy,
        *,
        settle: Callable[[DomainName], Awaitable[None]],
        start: Callable[[DomainName], Awaitable[bool]],
        remark: Callable[[DomainName, str], Awaitable[None]],
        own: Callable[[Coroutine[Any, Any, None], str], None],
        events: EventLog,
    ) -> None:
        """`settle` brings record and process together, `start` starts it if it is still `due`
        (False: it isn't), `remark` adds to its history, `own` runs a task with a name."""
        self._node = node
        self._policy = policy
        self._settle = settle
        self._start = start
        self._remark = remark
        self._own = own
        self._events = events
        self._notes = RestartNotes()
        self._crashed: set[DomainName] = set()
        """Whose process here died; until it is known what comes of that, or it ends otherwise."""
        self._running: set[DomainName] = set()
        self._slots = asyncio.Semaphore(PARALLEL)
        self._known_at: dict[str, float] = {}
        """Since when each is wanted, by the monotonic clock; as earlier agents noted it."""

    # --- what is wanted ----------------------------------------------------------------------

    async def begin(
        self,
        records: Mapping[DomainName, OwnershipRecord],
        here: Collection[DomainName],
        claimed: Collection[DomainName],
        crashed: Collection[DomainName],
    ) -> Collection[DomainName]:
        """At the agent's start: which domains are to be started again.

        `here` have a process, `claimed` ones a migration that decides about them first; of the
        `crashed` it is certain that nobody asked for their end.
        """
        notes = await self._load()
        ending = _still_ending(notes, records, here)
        wanted: dict[str, Wanted] = {}
        if self._policy.enabled:
            ours = {domain for domain, each in records.items() if each.owner == self._node}
            left = (ours | set(claimed)) - set(here)
            wanted = self._carried_on(notes, left)
            left -= set(ending)
            wanted |= self._lost_before(notes, left, records, claimed, crashed)
        self._crashed |= {domain for domain in crashed if domain in records} - set(wanted)
        self._notes = RestartNotes(
            boot_id=self._policy.boot_id,
            wanted=wanted,
            tries={} if notes.host_ends else self._recent(notes.tries),
            ending=ending,
        )
        if self._notes != notes:
            await self._save()
        return [DomainName(name) for name in wanted]

    async def _load(self) -> RestartNotes:
        """What the last agent left."""
        try:
            return await self._policy.store.load()
        except StoreError as error:
            log.error("which domains were to be started again is not known: %s", error)
            return RestartNotes()

    def _carried_on(self, notes: RestartNotes, left: Collection[DomainName]) -> dict[str, Wanted]:
        """What the last agent wanted, of what is `left` without a process; since when it did."""
        wanted = {name: each for name, each in notes.wanted.items() if name in left}
        wall_s, now = self._policy.clock(), self._policy.monotonic()
        if notes.host_ends:  # For as long as the host was off nobody could start them.
            wanted = {
                name: msgspec.structs.replace(each, since_s=wall_s) for name, each in wanted.items()
            }
        self._known_at = {
            name: now - max(wall_s - each.since_s, 0.0) for name, each in wanted.items()
        }
        return wanted

    def _lost_before(
        self,
        notes: RestartNotes,
        left: Collection[DomainName],
        records: Mapping[DomainName, OwnershipRecord],
        claimed: Collection[DomainName],
        crashed: Collection[DomainName],
    ) -> dict[str, Wanted]:
        """What was lost since: each that crashed, and all, if the host has been off."""
        why = "its hypervisor died before this agent began"
        lost = self._lost(why, set(left) & set(crashed), records, claimed)
        if notes.host_ends:
            lost |= self._lost(self._ended, left, records, claimed)
        elif notes.boot_id not in ("", self._policy.boot_id):
            why = f"{self._node} was rebooted, or lost power"
            lost |= self._lost(why, left, records, claimed)
        return lost

    def _lost(
        self,
        why: str,
        left: Collection[DomainName],
        records: Mapping[DomainName, OwnershipRecord],
        claimed: Collection[DomainName],
    ) -> dict[str, Wanted]:
        now_s = self._policy.clock()
        lost: dict[str, Wanted] = {}
        for domain in left:
            owned = records.get(domain)
            if domain in claimed:
                lost[domain] = Wanted(token=None, why=why, since_s=now_s)
            elif owned is not None and owned.state is OwnershipState.RUNNING:
                lost[domain] = Wanted(token=owned.token, why=why, since_s=now_s)
        self._known_at |= dict.fromkeys(lost, self._policy.monotonic())
        return lost

    @property
    def _ended(self) -> str:
        return f"{self._node} was shut down"

    @property
    def host_ends(self) -> bool:
        """Whether this host goes down: nothing may be started here."""
        return self._notes.host_ends

    async def end_host(self) -> None:
        """Its guests are shut down from now on, and started again by the next agent. Idempotent."""
        if not self._notes.host_ends:
            self._notes = msgspec.structs.replace(self._notes, host_ends=True)
            await self._save()

    def go_on(self, domains: Sequence[DomainName]) -> None:
        """Start them again, in this order, where they are wanted."""
        for domain in domains:
            self.start_soon(domain)

    def note(self, event: DomainEvent) -> None:
        """An EXITED event. What follows from it is decided when the record is settled."""
        (self._crashed.add if event.crashed else self._crashed.discard)(event.domain)

    async def lost(self, domain: DomainName, owned: OwnershipRecord) -> str:
        """`owned` is this node's and RUNNING, and there is no process. Call it before STOPPED.

        Returns why the domain is to be started again; "" if it isn't.
        """
        why = "its hypervisor died" if domain in self._crashed else ""
        self._crashed.discard(domain)
        if self.host_ends:
            why = self._ended
        if why and self._policy.enabled:
            since_s = self._policy.clock()
            self._known_at[domain] = self._policy.monotonic()
            await self._want(domain, Wanted(token=owned.token, why=why, since_s=since_s))
        return await self.stands(owned)

    async def stands(self, owned: OwnershipRecord) -> str:
        """There is no process of its domain. Why it is still to be started again; "": it isn't."""
        domain = DomainName(owned.domain)
        wanted = self._notes.wanted.get(domain)
        if wanted is None or not self.due(owned):
            await self.drop(domain)
            return ""
        await self._want(domain, msgspec.structs.replace(wanted, token=owned.token))
        return wanted.why

    async def follow(self, owned: OwnershipRecord) -> None:
        """A start of this node's has taken the record, an operator's maybe; it may fail yet."""
        domain = DomainName(owned.domain)
        wanted = self._notes.wanted.get(domain)
        if wanted is not None:
            await self._want(domain, msgspec.structs.replace(wanted, token=owned.token))

    def due(self, owned: OwnershipRecord) -> bool:
        """Whether the domain with this record is to be started again."""
        wanted = self._notes.wanted.get(owned.domain)
        if wanted is None or owned.owner != self._node:
            return False
        if wanted.token is None:
            return owned.state is OwnershipState.RUNNING
        return owned.token in (wanted.token, wanted.token + 1)

    def wanted(self, domain: DomainName) -> Wanted | None:
        """Why, and since when."""
        return self._notes.wanted.get(domain)

    def all_wanted(self) -> Sequence[DomainName]:
        """Whatever their records say by now; see `due`."""
        return [DomainName(name) for name in self._notes.wanted]

    def idle(self) -> Sequence[DomainName]:
        """Those that are wanted, and that nobody starts now: they have yet to be settled."""
        return [
            domain for domain in map(DomainName, self._notes.wanted) if domain not in self._running
        ]

    async def drop(self, domain: DomainName) -> bool:
        """It needn't be started again any more. Whether it was to be."""
        if domain not in self._notes.wanted:
            return False
        self._known_at.pop(domain, None)
        wanted = {name: each for name, each in self._notes.wanted.items() if name != domain}
        self._notes = msgspec.structs.replace(self._notes, wanted=wanted)
        await self._save()
        return True

    @contextlib.asynccontextmanager
    async def ending(self, owned: OwnershipRecord) -> AsyncIterator[None]:
        """While somebody has a domain stopped: if all this dies meanwhile, it stays stopped."""
        await self._set_ending({**self._notes.ending, owned.domain: owned.token})
        try:
            yield
        except asyncio.CancelledError:
            raise  # This agent ends, and the guest may yet do what it was asked for.
        except BaseException:
            await self._not_ending(owned)
            raise
        await self._not_ending(owned)

    async def _not_ending(self, owned: OwnershipRecord) -> None:
        left = {name: each for name, each in self._notes.ending.items() if name != owned.domain}
        await self._set_ending(left)

    async def _set_ending(self, ending: dict[str, int]) -> None:
        self._notes = msgspec.structs.replace(self._notes, ending=ending)
        await self._save()

    async def _want(self, domain: DomainName, wanted: Wanted) -> None:
        if self._notes.wanted.get(domain) == wanted:
            return
        self._notes = msgspec.structs.replace(
            self._notes, wanted={**self._notes.wanted, domain: wanted}
        )
        await self._save()

    async def _save(self) -> None:
        """Where that fails, only this agent knows."""
        try:
            await self._policy.store.save(self._notes)
        except StoreError as error:
            log.error("which domains are to be started again was not noted: %s", error)

    # --- starting ----------------------------------------------------------------------------

    def start_soon(self, domain: DomainName) -> None:
        """Start it in the background, if it is wanted. Idempotent."""
        due = domain in self._notes.wanted and not self.host_ends
        if due and domain not in self._running:
            self._running.add(domain)
            self._own(self._until_started(domain), f"start-again-{domain}")

    async def _until_started(self, domain: DomainName) -> None:
        pause_s, told = PAUSE_S, False
        try:
            while domain in self._notes.wanted and not self.host_ends:  # Bounded by GIVE_UP_S.
                async with self._slots:
                    error = await self._try(domain)
                if error is None:
                    continue
                log.warning("domain %s could not be started again: %s", domain, error)
                if not told:
                    told = True
                    await self._tell(domain, f"could not be started again yet: {error}")
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, PAUSE_S_MAX)
        finally:
            self._running.discard(domain)

    async def _try(self, domain: DomainName) -> FerryError | None:
        """One start, if it is still wanted; afterwards it isn't, or the error says why it is."""
        wanted, now_s = self._notes.wanted.get(domain), self._policy.clock()
        if wanted is None or self.host_ends:
            return None
        reason = ""
        if len(self._recent(self._notes.tries).get(domain, ())) >= TRIES:
            minutes = f"{WITHIN_S / 60:.0f} minutes"
            reason = f"it was started again {TRIES} times in {minutes}, and lost again"
        elif self._waited_s(domain) > GIVE_UP_S:
            reason = f"it could not be started again for {GIVE_UP_S / 3600:.0f} hours"
        if reason:
            await self._give_up(domain, f"{reason} ({wanted.why}); it is left stopped")
        try:
            await self._settle(domain)
            if domain not in self._notes.wanted:
                return None
            await self._count(domain, now_s)
            if not await self._start(domain):
                await self.drop(domain)
        except FerryError as error:
            await self._uncount(domain, now_s)
            return error
        return None

    def _waited_s(self, domain: DomainName) -> float:
        """A clock that is set while domains wait for their turn or their storage is no wait."""
        now = self._policy.monotonic()
        return now - self._known_at.setdefault(domain, now)

    async def _give_up(self, domain: DomainName, text: str) -> None:
        await self.drop(domain)
        self._events.emit(
            EventKind.DOMAIN_START_FAILED, f"domain {domain}: {text}", domain=domain, left=True
        )
        await self._tell(domain, text)

    async def _tell(self, domain: DomainName, text: str) -> None:
        try:
            await self._remark(domain, text)
        except FerryError as error:
            log.warning("domain %s: %s; that was not added to its history: %s", domain, text, error)

    async def _count(self, domain: DomainName, at_s: float) -> None:
        """Before the start: it may be what kills this agent, or this node."""
        tries = self._recent(self._notes.tries)
        await self._set_tries({**tries, domain: (*tries.get(domain, ()), at_s)})

    async def _uncount(self, domain: DomainName, at_s: float) -> None:
        """That start failed, and was undone."""
        left = tuple(each for each in self._notes.tries.get(domain, ()) if each != at_s)
        await self._set_tries(self._recent({**self._notes.tries, domain: left}))

    async def _set_tries(self, tries: dict[str, tuple[float, ...]]) -> None:
        if tries != self._notes.tries:
            self._notes = msgspec.structs.replace(self._notes, tries=tries)
            await self._save()

    def _recent(self, tries: Mapping[str, tuple[float, ...]]) -> dict[str, tuple[float, ...]]:
        now_s = self._policy.clock()
        recent = {
            name: tuple(at_s for at_s in each if now_s - WITHIN_S <= at_s <= now_s)
            for name, each in tries.items()
        }
        return {name: each for name, each in recent.items() if each}


def _still_ending(
    notes: RestartNotes,
    records: Mapping[DomainName, OwnershipRecord],
    here: Collection[DomainName],
) -> dict[str, int]:
    """Whose end was asked for. What still runs here was stopped by nobody in the end."""
    return {
        name: token
        for name, token in notes.ending.items()
        if (owned := records.get(DomainName(name))) is not None
        and name not in here
        and owned.token == token
    }
