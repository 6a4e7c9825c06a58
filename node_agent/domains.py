"""The domains of this node: every operation that its owner carries out.

    start   lock ─► record (token+1, this node, RUNNING) ─► volumes, taps, fence ─► hypervisor
                    any failure: process gone, all closed, record STOPPED
    stop    lock ─► hypervisor ─► process gone ─► taps, volumes closed ─► record STOPPED

Operations take the domain's lock; a migration's claim on it refuses them (`domain_locks`). What
happens to the record, also after crashes and when a guest exits by itself: `domain_ownership`.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from typing import Final

import msgspec

from migrator.errors import (
    ConflictError,
    FabricError,
    FerryError,
    NotFoundError,
    RefusedError,
    WrongStateError,
)
from migrator.model import (
    DomainDefinition,
    DomainName,
    DomainSpec,
    DomainState,
    DomainStatus,
    FencingToken,
    NodeName,
    OwnershipRecord,
    PoolName,
)
from migrator.ports import (
    FabricDriver,
    HypervisorDriver,
    Launch,
    OwnershipStore,
    VolumeDriver,
)
from node_agent.closings import Closings
from node_agent.consoles import ConsoleChunk as ConsoleChunk
from node_agent.consoles import Consoles, read_console
from node_agent.domain_launch import Claim, LaunchBuilder, LaunchUndo
from node_agent.domain_locks import DomainLocks
from node_agent.domain_ownership import DomainOwnership
from node_agent.domain_records import DomainRecords, check_spec
from node_agent.domain_restart import RestartPolicy
from node_agent.events import EventKind, EventLog
from node_agent.io_recovery import IoRecovery
from node_agent.mac_addresses import Roll, with_macs
from node_agent.memory_room import MemoryRoom
from node_agent.older_store import OtherNodes
from node_agent.resources import DomainRecord
from node_agent.start_needs import boot_troubles, host_troubles, volume_troubles
from node_agent.storage_watch import StorageWatch
from node_agent.volume_works import VolumeWorks

log = logging.getLogger(__name__)

_HERE: Final = frozenset(
    {DomainState.RUNNING, DomainState.PAUSED, DomainState.IO_ERROR, DomainState.CRASHED}
)


class DomainService:
    """See the module. `open` subscribes to the hypervisor, `close` ends the background tasks.

    Errors of every operation: NotFoundError (no such domain), ConflictError (another node owns
    it, or it is migrating), StoreError (unknown outcome), and those of the drivers.
    """

    def __init__(
        self,
        node: NodeName,
        *,
        hypervisor: HypervisorDriver,
        pools: Mapping[PoolName, VolumeDriver],
        fabric: FabricDriver,
        ownership: OwnershipStore,
        records: DomainRecords,
        events: EventLog,
        pin_machine: Callable[[str], Awaitable[str]],
        restart: RestartPolicy,
        locks: DomainLocks | None = None,
        cordon: Callable[[], Awaitable[list[str]]] | None = None,
        claim: Claim | None = None,
        storage: StorageWatch | None = None,
        consoles: Consoles | None = None,
        closings: Closings | None = None,
        works: VolumeWorks | None = None,
        clock: Callable[[], float] = time.time,
        roll: Roll = secrets.token_bytes,
        others: OtherNodes | None = None,
        room: MemoryRoom | None = None,
    ) -> None:
        """`restart`: which of its domains that were lost are started again.

        `storage`: what is known of pools that don't answer; its owner opens it.
        `consoles`: keeps their texts apart; None: nobody does.
        `claim`: see `domain_launch.Claim`, `others`: see `older_store`; None: nobody is asked.
        `cordon`: why nothing may start here now; None: something always may.
        `room`: for one more; None: always.
        """
        self.node = node
        self._cordon = cordon
        self._storage = storage
        self._consoles = consoles
        self._closings = closings
        self._works = works
        self.locks = locks or DomainLocks()
        self.room = room or MemoryRoom(node, hypervisor, records)
        self._hypervisor = hypervisor
        self._pools = pools
        self._fabric = fabric
        self._launches = LaunchBuilder(pools, fabric, claim, closings)
        self._records = records
        self._events = events
        self._pin_machine = pin_machine
        self._clock = clock
        self._roll = roll
        self.ownership = DomainOwnership(
            node,
            hypervisor=hypervisor,
            launches=self._launches,
            ownership=ownership,
            records=records,
            events=events,
            locks=self.locks,
            restart=restart,
            start_again=self._start_again,
            remark=self._remark,
            others=others,
        )
        self.room.restarts = self.ownership.restarts
        self._io_recovery = IoRecovery(
            hypervisor=hypervisor,
            launches=self._launches,
            ownership=self.ownership,
            records=records,
            locks=self.locks,
            events=events,
        )

    async def open(
        self, adopted: Sequence[DomainName], claimed: Collection[DomainName] = ()
    ) -> None:
        """Reconcile the adopted guests (see `DomainOwnership.reconcile`), then watch over them.

        The locks of `claimed` domains must have been claimed for their migrations already.
        """
        await self.ownership.reconcile(adopted, claimed)
        for domain in adopted:
            spec = await self._hypervisor.launched(domain)
            if spec is not None:
                await self._fabric.watch(domain, spec.nics)
        if self._closings is not None:
            await self._closings.open()
        if self._works is not None:
            self._works.open()
        await self.ownership.open()
        await self._io_recovery.open()

    async def close(self) -> None:
        """Guests go on; only this service's own tasks end. Idempotent."""
        await self._io_recovery.close()
        await self.ownership.close()
        if self._closings is not None:
            await self._closings.close()
        if self._works is not None:
            await self._works.close()

    # --- definitions -------------------------------------------------------------------------

    async def define(self, definition: DomainDefinition) -> DomainRecord:
        """Validate, give each NIC a MAC, pin the machine type and write the definition.

        InvalidRequest names each wrong field; ConflictError what another domain already has.
        """
        name = definition.name
        check_spec(with_macs(definition, self._roll), self._pools.keys())
        machine = await self._pin_machine(definition.machine)
        pinned = msgspec.structs.replace(definition, machine=machine)
        record = await self._records.define(pinned, self._roll, at_s=self._clock())
        self._events.emit(EventKind.DOMAIN_DEFINED, f"domain {name} was defined", domain=name)
        return record

    async def lacking(self, spec: DomainSpec) -> Sequence[str]:
        """What a start on this node would be refused for now, of what isn't here; a sentence each.

        Of no concern to a domain that is meant for another node.
        """
        boot, volumes, host, memory = await asyncio.gather(
            boot_troubles(spec),
            volume_troubles(spec, self._pools),
            host_troubles(spec, self._hypervisor, self._fabric),
            self.room.troubles(spec),
        )
        found = {**boot, **volumes, **host, **memory}
        return [f"on {self.node}: {field}: {why}" for field, why in found.items()]

    async def delete(self, domain: DomainName) -> None:
        """Remove a stopped domain's definition and ownership record. Its volumes stay.

        The definition goes first: who starts it meanwhile on another node wins the record first,
        and looks at the definition then. So one of the two sees the other. Where that is as far as
        a deletion came, because its agent died or the store gave no answer, this is the rest of it.
        """
        async with self.locks.hold(domain, "delete"):
            owned = await self.ownership.stopped(domain)
            record = await self._records.find(domain)
            if record is not None:
                await self._records.remove(domain)
            elif owned is None:
                raise NotFoundError(f"there is no domain {domain}")
            try:
                await self.ownership.forget(domain)
            except (ConflictError, WrongStateError):
                if record is not None:
                    await self._records.put_back(record)
                raise
        self._events.emit(EventKind.DOMAIN_DELETED, f"domain {domain} was deleted", domain=domain)

    # --- running -----------------------------------------------------------------------------

    async def start(self, domain: DomainName) -> OwnershipRecord:
        """Take ownership and run the domain here. On failure nothing runs and nothing is left.

        ConflictError says who runs it, where it runs already; RefusedError: the node is kept free,
        or has no memory left for it.
        """
        await self._refuse_closed(domain)
        async with self.locks.hold(domain, "start"), self.room.held(domain):
            owned = await self._take_and_launch(domain)
        self._emit_started(owned, f"domain {domain} was started on {self.node}")
        return owned

    async def _start_again(self, domain: DomainName) -> bool:
        """Start it if it is still to be (`domain_restart`). Whether it was; errors as `start`."""
        await self._refuse_closed(domain)
        async with self.locks.hold(domain, "start"):
            wanted = self.ownership.restarts.wanted(domain)
            if wanted is None or not await self.ownership.may_start_again(domain):
                return False
            owned = await self._take_and_launch(domain)
        self._emit_started(owned, f"domain {domain} was started again on {self.node}: {wanted.why}")
        return True

    async def closed(self) -> list[str]:
        """Why nothing may start here, or come here, now: the host goes down, or is kept free."""
        if self.ownership.restarts.host_ends:
            mend = "if it stays up, `systemctl restart ferry-agent` there starts them"
            return [f"{self.node} is going down, and its guests with it ({mend})"]
        return [] if self._cordon is None else await self._cordon()

    async def _refuse_closed(self, domain: DomainName) -> None:
        if reasons := await self.closed():
            raise RefusedError(f"domain {domain} was not started: {reasons[0]}", reasons)

    async def _take_and_launch(self, domain: DomainName) -> OwnershipRecord:
        spec = (await self._records.get(domain)).spec
        owned = await self.ownership.take(domain, spec)
        await self.ownership.restarts.follow(owned)
        await self.launch(owned, spec)
        await self.ownership.restarts.drop(domain)
        return owned

    def _emit_started(self, owned: OwnershipRecord, text: str) -> None:
        kind = EventKind.DOMAIN_STARTED
        self._events.emit(kind, text, domain=owned.domain, token=owned.token)

    async def _remark(self, domain: DomainName, text: str) -> None:
        await self._records.note(domain, text, user="", at_s=self._clock())

    async def stop(self, domain: DomainName, *, timeout_s: float = 30.0) -> bool:
        """Power the guest off; by force after `timeout_s`. True: it went by itself.

        One that waits to be started again isn't any more. WrongStateError if it doesn't run.
        """
        async with self.locks.hold(domain, "stop"):
            spec = (await self._records.get(domain)).spec
            if await self.ownership.call_off(domain):
                text = f"domain {domain} is not started again, and stays stopped"
                self._events.emit(EventKind.DOMAIN_STOPPED, text, domain=domain)
                return True
            owned = await self.ownership.owned_here(domain)
            async with self.ownership.restarts.ending(owned):
                by_itself = await self._hypervisor.stop(domain, timeout_s=timeout_s)
                await self.ownership.give_back(owned, spec)
        how = "powered off" if by_itself else "was ended by force"
        self._events.emit(EventKind.DOMAIN_STOPPED, f"domain {domain} {how}", domain=domain)
        return by_itself

    async def pause(self, domain: DomainName) -> None:
        """Stop the vCPUs. Idempotent. WrongStateError for one that a disk's error has stopped: a
        hypervisor can't tell the two, and it would go on when its storage does.
        """
        async with self.locks.hold(domain, "pause"):
            await self._records.get(domain)
            await self.ownership.owned_here(domain)
            state = (await self._hypervisor.inspect(domain)).state
            if state is DomainState.IO_ERROR:
                sentence = (
                    f"domain {domain} stands already, by a disk's error, and goes on by itself "
                    "when its storage answers; stop it if it must not"
                )
                raise WrongStateError(f"domain {domain}", state, "running", sentence)
            await self._hypervisor.pause(domain)
        self._events.emit(EventKind.DOMAIN_PAUSED, f"domain {domain} was paused", domain=domain)

    async def resume(self, domain: DomainName) -> None:
        """Run the vCPUs, also after an I/O error. Idempotent."""
        async with self.locks.hold(domain, "resume"):
            await self._records.get(domain)
            await self.ownership.owned_here(domain)
            state = (await self._hypervisor.inspect(domain)).state
            if state not in _HERE:
                raise WrongStateError(f"domain {domain}", state, "paused")
            await self._hypervisor.resume(domain)
        self._events.emit(EventKind.DOMAIN_RESUMED, f"domain {domain} was resumed", domain=domain)

    async def reset(self, domain: DomainName) -> None:
        """Reset the guest as its reset button would."""
        async with self.locks.hold(domain, "reset"):
            await self._records.get(domain)
            await self.ownership.owned_here(domain)
            await self._hypervisor.reset(domain)
        self._events.emit(EventKind.DOMAIN_RESET, f"domain {domain} was reset", domain=domain)

    async def status(self, domain: DomainName) -> DomainStatus:
        """What the hypervisor reports; STOPPED if it isn't here."""
        status = await self._hypervisor.inspect(domain)
        return self._remarked(status, await self._hypervisor.launched(domain))

    async def statuses(self) -> Sequence[DomainStatus]:
        """Every domain of this node, with the addresses that it was seen to use."""
        statuses: list[DomainStatus] = []
        for status in await self._hypervisor.list_domains():
            name = DomainName(status.name)
            spec = await self._hypervisor.launched(name)
            learnt = tuple(self._fabric.learnt(name, spec.nics)) if spec is not None else ()
            remarked = self._remarked(status, spec)
            statuses.append(msgspec.structs.replace(remarked, addresses=learnt))
        return statuses

    def _remarked(self, status: DomainStatus, spec: DomainSpec | None) -> DomainStatus:
        """With what is known of its storage, and done about a disk's error."""
        parts = [status.reason or ""]
        if status.state is DomainState.IO_ERROR:
            parts.append(self._io_recovery.remark(DomainName(status.name)))
        if self._storage is not None and spec is not None:
            parts.append(self._storage.remark(spec))
        return msgspec.structs.replace(status, reason="; ".join(filter(None, parts)) or None)

    async def console(
        self, domain: DomainName, *, offset: int | None = None, limit_bytes: int = 65_536
    ) -> ConsoleChunk:
        """Console output from `offset` on; None: its last `limit_bytes`. Empty if there is none.

        An offset behind the end (a log that was begun anew) reads from the beginning.
        """
        path = self._hypervisor.console_log(domain)
        return await read_console(path, offset, limit_bytes)

    async def storage_troubles(self, spec: DomainSpec) -> Sequence[str]:
        """Which pools of a domain that runs here don't answer, as was told, and still is so."""
        return [] if self._storage is None else await self._storage.troubles(spec)

    async def build_launch(
        self, spec: DomainSpec, token: FencingToken
    ) -> tuple[Launch, LaunchUndo]:
        """Open volumes and plug taps for `spec` under `token`, for a start or a destination.

        Afterwards either `undo.release()` (it was launched) or `await undo()` (it wasn't).
        RefusedError: it can't be booted here; nothing was opened.
        """
        if fields := await boot_troubles(spec):
            reasons = [f"{field}: {trouble}" for field, trouble in fields.items()]
            raise RefusedError(
                f"domain {spec.name} can't be booted on {self.node}: {'; '.join(reasons)}",
                reasons,
                fields,
            )
        if self._consoles is not None:
            await self._consoles.begin(DomainName(spec.name))
        return await self._launches.build(spec, token)

    async def fence(self, spec: DomainSpec, token: FencingToken) -> str:
        """As `LaunchBuilder.fence`."""
        return await self._launches.fence(spec, token)

    async def tear_down(self, spec: DomainSpec, token: FencingToken) -> None:
        """Unplug and close what a domain had open here, when its process is gone. Idempotent."""
        await self._launches.tear_down(spec, token)

    async def launch(
        self,
        owned: OwnershipRecord,
        spec: DomainSpec,
        confirm: Callable[[DomainSpec, FencingToken], Awaitable[None]] | None = None,
    ) -> None:
        """Run a domain whose record was just won, under its lock. On failure it is given back.

        `confirm` is awaited between the fence and the first vCPU.
        """
        token = FencingToken(owned.token)
        try:
            await self._records.get(DomainName(spec.name))  # Deleted elsewhere meanwhile? Then not.
            if self._works is not None:
                await self._works.refuse_start(spec)
            launch, undo = await self.build_launch(spec, token)
            try:
                await self._launches.fence(spec, token)
                if confirm is not None:
                    await confirm(spec, token)
                await self._hypervisor.start(launch)
            finally:
                undo.release()  # `give_back` does the rest where this failed.
        except BaseException as error:
            await self._undo_start(owned, spec)
            self._events.emit(
                EventKind.DOMAIN_START_FAILED,
                f"domain {spec.name} could not be started: {error}",
                domain=spec.name,
            )
            raise
        await self._announce(spec)

    async def _announce(self, spec: DomainSpec) -> None:
        """It may have run elsewhere before: tell the network where it is. Never fails a start."""
        try:
            await self._fabric.announce(DomainName(spec.name), spec.nics)
        except FabricError as error:
            log.warning("domain %s runs, but the network wasn't told: %s", spec.name, error)

    async def _undo_start(self, owned: OwnershipRecord, spec: DomainSpec) -> None:
        try:
            await self.ownership.give_back(owned, spec)
        except FerryError as error:  # The sweep tries again.
            log.error("domain %s: its start could not be undone: %s", spec.name, error)
