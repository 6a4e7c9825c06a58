"""A host that goes down: its guests are shut down in order before it, and start again with it.

    systemd stops ferry-guests.service ──► ferry node shutdown-guests
      the agent answers ──► HostShutdown       noted durably: every end is the host's from now on,
                                               nothing starts, nothing comes here
                                               what is being migrated: until its migration lets go
                                               power button ─► by force ─► record STOPPED, wanted
      it doesn't        ──► without_agent      the same note, power button ─► by force

Both have `limit_s` for all guests, and some seconds more for ending by force those that don't go.

Those with the lowest `priority` are asked first, for the highest were started first, and others may
need them until they end. But order never costs a guest its time: the last are asked after half
of the limit, whoever is still there; and all of one priority are asked at once, as an idle guest
is no load, and one that waits for its turn in vain is lost.

A migration goes on as it would. One that hasn't ended after half of the limit is cancelled, so that
its guest isn't cut off by the host's end; where that is too late (post-copy) it is waited for. One
that has hold of its guest to the last keeps it: its journal says in the next boot what is true.

Without an agent no record changes: the next one finds domains that are recorded to run here, in
another boot, as after a power cut. A store that is away while the agent works costs the same.
"""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable
from typing import Final

import msgspec

from migrator.errors import ConflictError, FerryError, NotFoundError, WrongStateError
from migrator.model import DomainName, DomainSpec, DomainState, MigrationId, NodeName
from migrator.ports import HypervisorDriver
from node_agent.domains import DomainService
from node_agent.events import EventKind, EventLog
from node_agent.resources import GuestLeft, GuestsEnded
from node_agent.restart_notes import RestartStore

log = logging.getLogger(__name__)

FORCE_S: Final = 45.0
"""Beyond the limit, for those that are ended by force: the longest that drivers take for one."""
_COPIES: Final = (DomainState.INCOMING, DomainState.LOADED, DomainState.POSTMIGRATE)
"""A migration's, and not the guest: none of them may be ended without it."""


class HostShutdown:
    """See the module. In the agent."""

    def __init__(
        self,
        node: NodeName,
        *,
        hypervisor: HypervisorDriver,
        domains: DomainService,
        cancel: Callable[[MigrationId, str], Awaitable[object]],
        events: EventLog,
    ) -> None:
        """`cancel` asks a migration's source to give it up, for somebody."""
        self.node = node
        self._hypervisor = hypervisor
        self._domains = domains
        self._cancel = cancel
        self._events = events
        self._turn = asyncio.Lock()

    async def run(self, limit_s: float) -> GuestsEnded:
        """End every guest here. Nothing starts here any more until the next agent does.

        Ends FORCE_S after `limit_s` at the latest, and says which are left, and why. A second call
        waits for the first one, and ends what that has left.
        """
        async with self._turn:
            await self._domains.ownership.restarts.end_host()
            until = _now() + limit_s
            round_ = _Round(limit_s, lambda domain: self._end(domain, until, limit_s))
            while True:  # Starts and migrations that were under way may have brought more.
                new = [
                    spec
                    for spec in await self._hypervisor.launched_all()
                    if spec.name not in round_.asked
                ]
                if not new:
                    break
                if round_.asked and _now() >= until:
                    round_.leave(new)
                    break
                await round_.play(new, until)
            return round_.ended()

    async def _end(self, domain: DomainName, until: float, limit_s: float) -> bool | None:
        """Whether it powered off by itself; None: it isn't here any more. FerryError: it is."""
        while True:  # Bounded by `until`: a drain, say, may begin a migration in between.
            await self._until_released(domain, until, limit_s)
            try:
                async with self._domains.locks.hold(
                    domain, "the host's shutdown", wait_s=max(until - _now(), 1.0)
                ):
                    if (await self._hypervisor.inspect(domain)).state is DomainState.STOPPED:
                        return None
                    by_itself = await _power_off(self._hypervisor, domain, until)
                break
            except ConflictError:
                if _now() >= until or self._domains.locks.migration_of(domain) is None:
                    raise
        if by_itself is False:
            text = f"domain {domain} was ended by force: it didn't power itself off"
            self._events.emit(EventKind.DOMAIN_STOPPED, text, domain=domain, forced=True)
        try:
            await self._domains.ownership.settle(domain)
        except FerryError as error:  # The sweep comes again, or the next boot's agent.
            log.warning("domain %s has ended, and its record doesn't say so yet: %s", domain, error)
        return by_itself

    async def _until_released(self, domain: DomainName, until: float, limit_s: float) -> None:
        """ConflictError: a migration has hold of it to the last."""
        locks = self._domains.locks
        if await self._released(domain, until - limit_s / 2):
            return
        if (migration := locks.migration_of(domain)) is not None:
            try:
                await self._cancel(migration, f"{self.node}, which goes down")
            except FerryError as error:
                log.info("domain %s: its migration goes on: %s", domain, error)
        if not await self._released(domain, until):
            migration = locks.migration_of(domain)
            raise ConflictError(f"domain {domain} is still being migrated (migration {migration})")

    async def _released(self, domain: DomainName, until: float) -> bool:
        locks, released = self._domains.locks, asyncio.Event()
        unsubscribe = locks.on_release(lambda each: released.set() if each == domain else None)
        try:
            async with asyncio.timeout_at(until):
                while locks.migration_of(domain) is not None:
                    await released.wait()
                    released.clear()
        except TimeoutError:
            return locks.migration_of(domain) is None
        finally:
            unsubscribe()
        return True


async def without_agent(
    hypervisor: HypervisorDriver, store: RestartStore, limit_s: float
) -> GuestsEnded:
    """End every guest of this host, whose agent is down. `hypervisor` isn't open.

    HypervisorError: an agent uses it, or it can't be opened; nothing was done.
    """
    await hypervisor.open()
    try:
        guests = await hypervisor.launched_all()
        if guests:
            await store.save(msgspec.structs.replace(await store.load(), host_ends=True))
        until = _now() + limit_s
        round_ = _Round(limit_s, lambda domain: _power_off(hypervisor, domain, until))
        await round_.play(guests, until)
        return round_.ended()
    finally:
        await hypervisor.close()


async def _power_off(hypervisor: HypervisorDriver, domain: DomainName, until: float) -> bool | None:
    if (state := (await hypervisor.inspect(domain)).state) in _COPIES:
        raise WrongStateError(f"domain {domain}", state, "running")
    try:
        return await hypervisor.stop(domain, timeout_s=max(until - _now(), 0.0))
    except NotFoundError:
        return None  # It has just ended.


class _Round:
    """Who was asked, and what came of it."""

    def __init__(self, limit_s: float, end: Callable[[DomainName], Awaitable[bool | None]]) -> None:
        self._limit_s = limit_s
        self._end = end
        self.asked: dict[str, asyncio.Task[None]] = {}
        self._how: dict[str, bool | None] = {}
        self._left: dict[str, str] = {}

    async def play(self, guests: Iterable[DomainSpec], until: float) -> None:
        """End them, in order; see the module. What hasn't ended FORCE_S after `until` is left."""
        levels: dict[int, list[DomainName]] = defaultdict(list)
        for spec in guests:
            levels[spec.priority].append(DomainName(spec.name))
        gap_s = self._limit_s / 2 / max(len(levels) - 1, 1)
        try:
            for priority in sorted(levels):
                for domain in levels[priority]:
                    task = asyncio.create_task(self._one(domain), name=f"shut-down-{domain}")
                    self.asked[domain] = task
                last = priority == max(levels)
                wait_s = max(until - _now(), 0.0) + FORCE_S if last else gap_s
                await asyncio.wait(self.asked.values(), timeout=wait_s)
        finally:
            for name, task in self.asked.items():
                if task.cancel():
                    self._left[name] = "its end was asked for, and takes long"

    def leave(self, guests: Iterable[DomainSpec]) -> None:
        """They came when the time was over."""
        self._left |= {spec.name: "it came here while the others were ended" for spec in guests}

    async def _one(self, domain: DomainName) -> None:
        try:
            self._how[domain] = await self._end(domain)
        except FerryError as error:
            log.warning("domain %s: %s", domain, error)
            self._left[domain] = str(error)
        except Exception as error:  # A driver's bug, which must not keep the others from ending.
            log.exception("domain %s was not shut down", domain)
            self._left[domain] = f"{type(error).__name__}: {error}"

    def ended(self) -> GuestsEnded:
        return GuestsEnded(
            powered_off=tuple(sorted(name for name, how in self._how.items() if how)),
            forced=tuple(sorted(name for name, how in self._how.items() if how is False)),
            left=tuple(GuestLeft(name=name, why=why) for name, why in sorted(self._left.items())),
        )


def _now() -> float:
    return asyncio.get_running_loop().time()
