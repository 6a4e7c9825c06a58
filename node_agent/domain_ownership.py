"""Which of the cluster's domains are this node's, and making records and processes agree.

    take ──► record (token+1, this node, RUNNING)      before a vCPU runs
    give_back ──► process gone, all closed ──► STOPPED  when none does

A crash in between leaves at worst a RUNNING record without a process. `settle` notices, when a
guest exits by itself and in a sweep every few seconds; and has a domain that was lost though it
should run started again (`domain_restart`).

A node that was cut off, or dead, may find that its domain was taken over meanwhile: its copy is
stale, and is destroyed before anything else is done with the domain (`end_stale`). It looks when
the agent starts (`reconcile`), in each sweep, which comes every second while the store can't be
read, and before a domain is taken or comes in.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection, Coroutine, Iterable, Sequence
from typing import Any, Final

import msgspec

from migrator.errors import ConflictError, FerryError, StoreError
from migrator.model import (
    DomainName,
    DomainSpec,
    DomainState,
    FencingToken,
    NodeName,
    OwnershipRecord,
    OwnershipState,
)
from migrator.ports import DomainEvent, DomainEventKind, HypervisorDriver, OwnershipStore
from node_agent.background import uninterrupted
from node_agent.domain_launch import LaunchBuilder
from node_agent.domain_locks import DomainLocks
from node_agent.domain_records import DomainRecords, not_running, running
from node_agent.domain_restart import DomainRestarts, RestartPolicy
from node_agent.events import EventKind, EventLog
from node_agent.older_store import OlderStore, OtherNodes

log = logging.getLogger(__name__)

SWEEP_S: Final = 10.0
UNREAD_S: Final = 1.0
"""Between tries to read the store, when it couldn't be: a stale copy must not live for long."""
TAKEOVER_STEP: Final = 2
"""By how much a takeover raises the token. A handoff raises it by one: the silent node may have
begun one, to this very node, and must not take this record for its outcome, and take it back."""
_NEVER_RAN: Final = (DomainState.INCOMING, DomainState.LOADED)


class DomainOwnership:
    """See the module. `open` starts the sweep and listens to the hypervisor; `close` ends both."""

    def __init__(
        self,
        node: NodeName,
        *,
        hypervisor: HypervisorDriver,
        launches: LaunchBuilder,
        ownership: OwnershipStore,
        records: DomainRecords,
        events: EventLog,
        locks: DomainLocks,
        sweep_s: float = SWEEP_S,
        restart: RestartPolicy,
        start_again: Callable[[DomainName], Awaitable[bool]],
        remark: Callable[[DomainName, str], Awaitable[None]],
        others: OtherNodes | None = None,
    ) -> None:
        """See `DomainRestarts` for the three before `others`, and `OlderStore` for that."""
        self.node = node
        self._hypervisor = hypervisor
        self._launches = launches
        self._ownership = ownership
        self._records = records
        self._events = events
        self._locks = locks
        self._sweep_s = sweep_s
        self.older = OlderStore(
            node,
            hypervisor=hypervisor,
            launches=launches,
            ownership=ownership,
            events=events,
            others=others,
        )
        self.restarts = DomainRestarts(
            node,
            restart,
            settle=self.settle,
            start=start_again,
            remark=remark,
            own=self._run,
            events=events,
        )
        self._waiting: Sequence[DomainName] = ()
        self._tasks: set[asyncio.Task[None]] = set()
        self._unsubscribe: list[Callable[[], None]] = []

    async def open(self) -> None:
        """Call it after `reconcile`: the sweep knows of migrations by their claims alone."""
        self._unsubscribe = [
            self._hypervisor.subscribe(self._on_hypervisor_event),
            self._locks.on_release(self._settle_later),
        ]
        self._run(self._sweep(), "domain-sweep")
        self.restarts.go_on(self._waiting)

    async def close(self) -> None:
        """Guests go on; only the background tasks end."""
        for unsubscribe in self._unsubscribe:
            unsubscribe()
        self._unsubscribe = []
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # --- under the domain's lock -------------------------------------------------------------

    async def take(self, domain: DomainName, spec: DomainSpec) -> OwnershipRecord:
        """Win the record for this node, with a newer token. ConflictError: nothing was changed."""
        owned = await self._ownership.read(domain)
        if owned is not None and owned.state is OwnershipState.RUNNING:
            if owned.owner != self.node:
                raise ConflictError(
                    f"domain {domain} runs on {owned.owner} (token {owned.token}); it was not "
                    f"started on {self.node}"
                )
            if (await self._hypervisor.inspect(domain)).state is not DomainState.STOPPED:
                raise ConflictError(f"domain {domain} runs on {self.node} already")
            await self.restarts.lost(domain, owned)  # Wanted, if this start fails.
        else:
            # First: once the record is ours, nothing tells a stale copy from the domain.
            await self.end_stale(domain)
        return await self._win(domain, spec, owned)

    async def take_over(
        self,
        domain: DomainName,
        spec: DomainSpec,
        owned: OwnershipRecord,
        vouched: Collection[NodeName] = (),
    ) -> OwnershipRecord:
        """Win the record from another node, whose copy may still run: only a fence ends it.

        `vouched`: nodes that are known to be off. ConflictError: the record isn't `owned` any more,
        or is an older store's (`OlderStore`); nothing was changed.
        """
        await self.end_stale(domain)
        return await self._win(domain, spec, owned, step=TAKEOVER_STEP, vouched=vouched)

    async def _win(
        self,
        domain: DomainName,
        spec: DomainSpec,
        owned: OwnershipRecord | None,
        step: int = 1,
        vouched: Collection[NodeName] = (),
    ) -> OwnershipRecord:
        await self._launches.claim(spec)
        fence = await self._launches.newest_fence(spec)
        await self.older.refuse_start(spec, owned, fence, vouched)
        newest = max(owned.token if owned else 0, fence)
        new = OwnershipRecord(
            domain=domain, token=newest + step, owner=self.node, state=OwnershipState.RUNNING
        )
        if not await self._ownership.compare_and_set(owned, new):
            raise ConflictError(f"domain {domain} was just started or moved by another node")
        return new

    async def give_back(self, owned: OwnershipRecord, spec: DomainSpec) -> None:
        """Make sure that nothing runs here, close everything, and set the record to STOPPED.

        Runs to its end also when cancelled. HypervisorError: the process can't be ended, so the
        record stays RUNNING.
        """
        await uninterrupted(self._give_back(owned, spec))

    async def owned_here(self, domain: DomainName) -> OwnershipRecord:
        """The record of a domain that runs here. WrongStateError, ConflictError otherwise."""
        owned = await self._ownership.read(domain)
        if owned is None or owned.state is not OwnershipState.RUNNING:
            raise not_running(domain)
        if owned.owner != self.node:
            raise ConflictError(f"domain {domain} runs on {owned.owner}, not on {self.node}")
        return owned

    async def stopped(self, domain: DomainName) -> OwnershipRecord | None:
        """The record of a domain that nobody runs, if there is one. WrongStateError: it runs."""
        owned = await self._ownership.read(domain)
        if owned is not None and owned.state is not OwnershipState.STOPPED:
            raise running(domain, owned.owner)
        return owned

    async def forget(self, domain: DomainName) -> None:
        """Remove the record of a stopped domain, or let another do so. WrongStateError: it runs."""
        owned = await self.stopped(domain)
        gone = owned is None or await self._ownership.remove(owned)
        if not gone and await self.stopped(domain) is not None:
            raise ConflictError(f"domain {domain} was just started; it was not deleted")

    async def _give_back(self, owned: OwnershipRecord, spec: DomainSpec) -> None:
        await self._hypervisor.destroy(DomainName(owned.domain))
        await self._launches.tear_down(spec, FencingToken(owned.token))
        stopped = msgspec.structs.replace(owned, state=OwnershipState.STOPPED)
        if not await self._ownership.compare_and_set(owned, stopped):
            log.error("domain %s: its record changed while it was being stopped", owned.domain)
        await self._hypervisor.forget_crash(DomainName(owned.domain))

    # --- bringing record and process together ------------------------------------------------

    async def reconcile(
        self, adopted: Sequence[DomainName], claimed: Collection[DomainName] = ()
    ) -> None:
        """At the agent's start: compare the processes found with the ownership records.

        `claimed` domains are left alone: a migration's journal decides about them. StoreError:
        some may be left as they were; guests go on. What is to be started again is settled by that,
        once this is open: its storage may take long to answer.
        """
        records = await self._records.list_ownership()
        crashed = self._hypervisor.crashed()
        all_wanted = await self.restarts.begin(records, adopted, claimed, crashed)
        # One that was adopted has died since then, and is settled below.
        for domain in set(crashed) - {*all_wanted, *claimed, *adopted}:
            await self._hypervisor.forget_crash(domain)
        wanted = set(all_wanted) - set(claimed)
        self._waiting = await self._by_priority(wanted) if wanted else ()
        guests = [domain for domain in adopted if domain not in claimed]
        await _side_by_side(self._reconcile_guest(each, records.get(each)) for each in guests)
        known = {*claimed, *adopted, *wanted}
        lost = [each for each, owned in records.items() if self._ours(owned) and each not in known]
        await _side_by_side(self.settle(each) for each in lost)

    async def _by_priority(self, domains: Collection[DomainName]) -> Sequence[DomainName]:
        known = await self._records.list_records()
        priority = {name: known[name].spec.priority for name in domains if name in known}
        return sorted(domains, key=lambda name: (-priority.get(name, 0), name))

    async def end_stale(self, domain: DomainName) -> None:
        """Destroy what runs here of a domain that isn't this node's. Idempotent.

        Under the domain's lock, or a migration's claim that has made no process yet. StoreError,
        HypervisorError: it may be there still. ConflictError: it is, see `OlderStore`.
        """
        if (await self._hypervisor.inspect(domain)).state is DomainState.STOPPED:
            return
        owned = await self._ownership.read(domain)
        if owned is not None and not self._ours(owned):
            await self._end_copy(domain, owned)

    async def settle(self, domain: DomainName) -> None:
        """If the record says that it runs here and it doesn't: close everything, STOPPED.

        What is to be started again then, is; what isn't any more is not.
        """
        async with self._locks.hold(domain, "clean-up"):
            owned = await self._ownership.read(domain)
            if owned is None or owned.owner != self.node:
                # This agent remembers a crash: a destination that fails may pass the domain back.
                await self._hypervisor.forget_crash(domain)
                await self.restarts.drop(domain)
                return
            if owned.state is OwnershipState.RUNNING:
                if (await self._hypervisor.inspect(domain)).state is not DomainState.STOPPED:
                    await self.restarts.drop(domain)
                    return
                await self._stop_lost(owned)
            else:
                await self._hypervisor.forget_crash(domain)
                await self.restarts.stands(owned)
        self.restarts.start_soon(domain)

    async def _stop_lost(self, owned: OwnershipRecord) -> None:
        domain = DomainName(owned.domain)
        spec = (await self._records.get(domain)).spec
        why = await self.restarts.lost(domain, owned)  # Its end has been reported by now.
        await self.give_back(owned, spec)
        then = f"it is to be started again: {why}" if why else "it is stopped now"
        kind = EventKind.DOMAIN_STOPPED if self.restarts.host_ends else EventKind.DOMAIN_LOST
        text = f"domain {domain} doesn't run on {self.node} any more; {then}"
        self._events.emit(kind, text, domain=domain)

    async def may_start_again(self, domain: DomainName) -> bool:
        """Under the domain's lock: whether it is stopped, and still to be started again."""
        owned = await self._ownership.read(domain)
        stopped = owned is not None and owned.state is OwnershipState.STOPPED
        return stopped and owned is not None and self.restarts.due(owned)

    async def call_off(self, domain: DomainName) -> bool:
        """Under the domain's lock: if it waits to be started again, it doesn't any more. Whether.

        StoreError, HypervisorError: it is called off, and not settled yet; the sweep comes again.
        """
        owned = await self._ownership.read(domain)
        waited = owned is not None and self.restarts.due(owned)
        await self.restarts.drop(domain)
        if owned is None or not waited:
            return False
        if owned.state is OwnershipState.RUNNING:
            if (await self._hypervisor.inspect(domain)).state is not DomainState.STOPPED:
                return False
            await self._stop_lost(owned)
        return True

    async def _reconcile_guest(self, domain: DomainName, owned: OwnershipRecord | None) -> None:
        if owned is None:
            await self.older.tell_unknown(domain)
            return
        ours, state = self._ours(owned), (await self._hypervisor.inspect(domain)).state
        if ours and state is DomainState.STOPPED:  # It died since it was adopted.
            await self.settle(domain)
            return
        if ours and state not in _NEVER_RAN:
            self._events.emit(
                EventKind.DOMAIN_ADOPTED,
                f"domain {domain} was adopted by the restarted agent of {self.node}",
                domain=domain,
                token=owned.token,
            )
            return
        try:
            await self._end_copy(domain, owned)
        except ConflictError as error:
            log.error("%s", error)
            return
        if ours:
            await self.settle(domain)

    async def _end_copy(self, domain: DomainName, owned: OwnershipRecord) -> None:
        await self.older.refuse_end(domain, owned)
        spec = await self._hypervisor.launched(domain)
        await self._hypervisor.destroy(domain)
        if spec is not None:
            await self._launches.tear_down(spec, FencingToken(owned.token))
        self._events.emit(
            EventKind.DOMAIN_DESTROYED,
            f"a guest of domain {domain} was ended on {self.node}: token {owned.token} belongs "
            f"to {owned.owner}, where the domain is {owned.state}",
            domain=domain,
        )

    def _ours(self, owned: OwnershipRecord) -> bool:
        return owned.owner == self.node and owned.state is OwnershipState.RUNNING

    async def _sweep(self) -> None:
        gap_s = self._sweep_s
        while True:
            await asyncio.sleep(gap_s)
            gap_s = self._sweep_s
            try:
                await self._sweep_once()
            except StoreError as error:
                log.warning("whose this node's domains are can't be read now: %s", error)
                gap_s = min(UNREAD_S, self._sweep_s)
            except FerryError as error:
                log.warning("the sweep over this node's domains failed: %s", error)
            except Exception:  # A bug; without the sweep a stale copy would live on for good.
                log.exception("the sweep over this node's domains failed")

    async def _sweep_once(self) -> None:
        records = await self._records.list_ownership()
        here = {
            DomainName(status.name)
            for status in await self._hypervisor.list_domains()
            if status.state is not DomainState.STOPPED
        }
        known = [(each, records[each]) for each in sorted(here & records.keys())]
        stale = [each for each, owned in known if not self._ours(owned)]
        await _side_by_side(self._unless_busy(each, self._end_stale_locked) for each in stale)
        for domain, owned in known:
            if self._ours(owned) and await self.older.newer_guest(domain, owned) is not None:
                await self._unless_busy(domain, self._catch_up)
        lost = [each for each, owned in records.items() if self._ours(owned) and each not in here]
        await _side_by_side(self._unless_busy(each, self.settle) for each in lost)
        for domain in self.restarts.idle():  # The store's answer was lost, say, when they stopped.
            await self._unless_busy(domain, self.settle)

    async def _end_stale_locked(self, domain: DomainName) -> None:
        async with self._locks.hold(domain, "clean-up"):
            await self.end_stale(domain)

    async def _catch_up(self, domain: DomainName) -> None:
        async with self._locks.hold(domain, "clean-up"):
            await self.older.catch_up(domain)

    def _on_hypervisor_event(self, event: DomainEvent) -> None:
        reported = {
            DomainEventKind.EXITED: (EventKind.DOMAIN_EXITED, f"its process on {self.node} ended"),
            DomainEventKind.PANICKED: (EventKind.DOMAIN_PANICKED, "the guest panicked"),
        }.get(event.kind)
        if reported is not None:
            kind, text = reported
            detail = f" ({event.detail})" if event.detail else ""
            self._events.emit(kind, f"domain {event.domain}: {text}{detail}", domain=event.domain)
        if event.kind is DomainEventKind.EXITED:
            self.restarts.note(event)
            self._settle_later(event.domain)

    def _settle_later(self, domain: DomainName) -> None:
        """From callbacks. A domain that a migration has is settled when it lets go."""
        if self._locks.migration_of(domain) is None:
            self._run(self._settle_logged(domain), f"settle-{domain}")

    def _run(self, work: Coroutine[Any, Any, None], name: str) -> None:
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _unless_busy(
        self, domain: DomainName, work: Callable[[DomainName], Awaitable[None]]
    ) -> None:
        """Not while a migration has it; another operation may have it, too: the sweep comes again.

        StoreError: as it stands.
        """
        if self._locks.migration_of(domain) is not None:
            return
        try:
            await work(domain)
        except ConflictError:
            log.debug("domain %s is busy; the sweep comes again", domain)
        except StoreError:
            raise
        except FerryError as error:
            log.warning("domain %s: could not be settled: %s", domain, error)
        except Exception:  # A driver's bug, which must not keep the others from being settled.
            log.exception("domain %s: could not be settled", domain)

    async def _settle_logged(self, domain: DomainName) -> None:
        try:
            await self._unless_busy(domain, self.settle)
        except StoreError as error:  # The sweep comes again.
            log.warning("domain %s: could not be settled: %s", domain, error)


async def _side_by_side(works: Iterable[Awaitable[None]]) -> None:
    """Each to its end, then the first error: none waits for the storage of another's disks.

    A copy that is stale has to end soon, and closing its disks may take as long as a storage hangs.
    """
    for result in await asyncio.gather(*works, return_exceptions=True):
        if isinstance(result, BaseException):
            raise result
