"""The cluster as any agent sees it: what the HTTP API calls.

    API ──► ClusterService ──► store             definitions, ownership, nodes, migrations
                           ──► PeerHub.call ──►  DomainService / MigrationService of the owner

Reading needs the store alone, plus a short question to the owners for what domains do right now;
an owner that doesn't answer makes its domains `unknown`, never the listing fail. Changing goes to
the node that owns the domain (`domain.*`) or is its migration's source (`migration.*`), whichever
agent was asked.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Final, TypeAlias, TypeVar

import msgspec

from migrator.errors import ConflictError, FerryError, RefusedError, StoreError, WrongStateError
from migrator.figures import DirtyRate, Prediction
from migrator.model import (
    DomainDefinition,
    DomainName,
    Migration,
    NodeName,
    NodeState,
    OwnershipRecord,
    OwnershipState,
)
from migrator.ports import OwnershipStore
from node_agent import loop_monitor
from node_agent.cluster_calls import (
    CONSOLE,
    DIRTY_RATE,
    MIGRATION_CANCEL,
    MIGRATION_CHECK,
    MIGRATION_CREATE,
    MIGRATION_GET,
    MIGRATION_LIMIT,
    MIGRATION_PREDICT,
    PAUSE,
    RESET,
    RESUME,
    START,
    STATUS_TIMEOUT_S,
    STOP,
    TAKE_OVER,
    ConsoleParams,
    DirtyRateParams,
    DomainParams,
    Done,
    MigrationCancel,
    MigrationLimit,
    MigrationParams,
    MigrationRef,
    PredictParams,
    StopParams,
    Stopped,
    TakeoverParams,
    Verdict,
)
from node_agent.cluster_views import domain_view, node_views, running_by_node
from node_agent.domain_records import DomainRecords, asking, asking_for_console, not_running
from node_agent.domains import ConsoleChunk, DomainService
from node_agent.events import EventLog
from node_agent.homes import (
    choose_destination,
    no_such_destination,
    note_refusal,
    refuse_unknown_voucher,
    where_to_start,
)
from node_agent.hooks.service import HookService
from node_agent.migrations.checks import one_way
from node_agent.migrations.endings import too_late
from node_agent.migrations.outline import MigrationOutline
from node_agent.migrations.service import MigrationService
from node_agent.nodes import NodeRegistry
from node_agent.owners import ask_owners
from node_agent.peers.hub import PeerHub
from node_agent.resources import (
    Domain,
    DryRun,
    Health,
    MigrationCreate,
    Node,
)
from node_agent.volumes import VolumeService

OPERATION_TIMEOUT_S: Final = 30.0
START_TIMEOUT_S: Final = 60.0
T = TypeVar("T")
_Answer: TypeAlias = tuple[T, Sequence[str]]
"""And what speaks against that destination."""


class ClusterService:
    """See the module. Errors: those of the services it calls, and PeerError."""

    def __init__(
        self,
        node: NodeName,
        *,
        hub: PeerHub,
        domains: DomainService,
        records: DomainRecords,
        ownership: OwnershipStore,
        migrations: MigrationService,
        nodes: NodeRegistry,
        volumes: VolumeService,
        events: EventLog,
        hooks: HookService,
    ) -> None:
        self.node = node
        self.events = events
        self.hooks = hooks
        self.volumes = volumes
        self._hub = hub
        self._domains = domains
        self._records = records
        self._ownership = ownership
        self._migrations = migrations
        self._nodes = nodes

    # --- nodes -------------------------------------------------------------------------------

    async def list_nodes(self) -> Sequence[Node]:
        """Every node, by name, with what runs on it."""
        views = await self._nodes.read()
        records = await self._records.list_records()
        running = running_by_node(records, await self._records.list_ownership())
        return node_views(views, running, self._hub.round_trip_ms, {self.node: self._nodes.trouble})

    async def list_neighbours(self) -> Sequence[Node]:
        """The same, of what runs only this node's: quicker, where there are many domains."""
        views = await self._nodes.read()
        running = {self.node: await self._records.running_on(self.node)}
        return node_views(views, running, self._hub.round_trip_ms, {self.node: self._nodes.trouble})

    async def health(self) -> Health:
        """StoreError if the store doesn't answer, or didn't take this node's last heartbeat."""
        if self._nodes.trouble:
            raise StoreError(f"this node's heartbeat isn't written: {self._nodes.trouble}")
        own = (await self._nodes.read()).get(self.node)
        version = own.info.agent_version if own else ""
        monitor = loop_monitor.current()
        return Health(
            node=self.node,
            status="ok",
            agent_version=version,
            loop_blocked_ms_max=monitor.longest_ms if monitor else 0.0,
            loop_blocks=tuple(monitor.blocks) if monitor else (),
        )

    # --- domains -----------------------------------------------------------------------------

    async def define(self, definition: DomainDefinition) -> Domain:
        """See `DomainService.define`. With `warnings`."""
        record = await self._domains.define(definition)
        warnings = tuple(await self._domains.lacking(record.spec))
        domain = await self.get_domain(DomainName(definition.name))
        return msgspec.structs.replace(domain, warnings=warnings)

    async def delete(self, domain: DomainName) -> None:
        """See `DomainService.delete`."""
        await self._domains.delete(domain)

    async def list_domains(self) -> Sequence[Domain]:
        """Every defined domain, by name."""
        records = await self._records.list_records()
        owned = await self._records.list_ownership()
        migrating = await self._migrating()
        defined = [record for name, record in owned.items() if name in records]
        snapshot = await ask_owners(self._hub, self._nodes, defined)
        return [
            domain_view(record, owned.get(name), snapshot, migrating.get(name))
            for name, record in sorted(records.items())
        ]

    async def get_domain(self, domain: DomainName) -> Domain:
        """NotFoundError if it isn't defined."""
        record = await self._records.get(domain)
        owned = await self._ownership.read(domain)
        snapshot = await ask_owners(self._hub, self._nodes, [owned] if owned else [])
        return domain_view(record, owned, snapshot, (await self._migrating()).get(domain))

    async def start(self, domain: DomainName, node: NodeName | None = None) -> Domain:
        """Start it on `node`; by default see `homes`."""
        await self._records.get(domain)
        if node is not None and node != self.node:
            await self._nodes.get(node)
        owned = await self._ownership.read(domain)
        views = {} if self._nodes.trouble else await self._nodes.read()  # Then all seem silent.
        place = await where_to_start(domain, node, owned, self.node, views, self.list_domains)
        await self._hub.call(
            place, START, DomainParams(domain=domain), OwnershipRecord, timeout_s=START_TIMEOUT_S
        )
        return await self.get_domain(domain)

    async def take_over(
        self,
        domain: DomainName,
        node: NodeName,
        powered_off: NodeName | None = None,
        user: str = "",
    ) -> Domain:
        """Start it from disk on `node`, with its silent owner shut out (`DomainTakeover`)."""
        await self._nodes.get(node)
        if powered_off is not None:
            owned = await self._ownership.read(domain)
            refuse_unknown_voucher(powered_off, owned, await self._nodes.read())
        params = TakeoverParams(domain=domain, powered_off=powered_off, user=user)
        await self._hub.call(node, TAKE_OVER, params, OwnershipRecord, timeout_s=START_TIMEOUT_S)
        return await self.get_domain(domain)

    async def stop(
        self, domain: DomainName, timeout_s: float, *, in_post_copy: bool = False
    ) -> Domain:
        """As `power_off`; and what it is then."""
        stopped = await self.power_off(domain, timeout_s, in_post_copy=in_post_copy)
        return msgspec.structs.replace(await self.get_domain(domain), forced=stopped.forced)

    async def power_off(
        self, domain: DomainName, timeout_s: float, *, in_post_copy: bool = False
    ) -> Stopped:
        """Power it off where it runs; by force after `timeout_s`. Or don't start it again there.

        `in_post_copy`: so end a guest, too, that waits for pages of another node.
        """
        params = StopParams(domain=domain, timeout_s=timeout_s, in_post_copy=in_post_copy)
        wait_s = timeout_s + OPERATION_TIMEOUT_S
        try:
            owner = await self._owner(domain)
        except WrongStateError as error:  # It may wait there to be started again.
            await self._call_off(params, error)
            return Stopped()
        with asking(owner, domain):
            return await self._hub.call(owner, STOP, params, Stopped, timeout_s=wait_s)

    async def _call_off(self, params: StopParams, stopped: WrongStateError) -> None:
        """By the node that had the domain last. `stopped` if that isn't to start it again."""
        owned = await self._ownership.read(params.domain)
        view = (await self._nodes.read()).get(NodeName(owned.owner)) if owned else None
        if owned is None or view is None or view.state is NodeState.UNREACHABLE:
            raise stopped
        node, wait_s = NodeName(owned.owner), OPERATION_TIMEOUT_S
        try:
            await self._hub.call(node, STOP, params, Stopped, timeout_s=wait_s)
        except ConflictError:
            raise stopped from None

    async def pause(self, domain: DomainName) -> Domain:
        """Stop its vCPUs where it runs."""
        return await self._operate(domain, PAUSE)

    async def resume(self, domain: DomainName) -> Domain:
        """Run its vCPUs where it is paused."""
        return await self._operate(domain, RESUME)

    async def reset(self, domain: DomainName) -> Domain:
        """Reset it where it runs."""
        return await self._operate(domain, RESET)

    async def console(
        self, domain: DomainName, *, offset: int | None, limit_bytes: int
    ) -> tuple[NodeName, ConsoleChunk]:
        """Its console on the node that owns it, or owned it last. Offsets belong to that node.

        Empty if it never ran: what there is may be a deleted one's of its name.
        """
        await self._records.get(domain)
        owned = await self._ownership.read(domain)
        if owned is None:
            return self.node, ConsoleChunk(offset=0, data=b"")
        node = NodeName(owned.owner)
        params = ConsoleParams(domain=domain, offset=offset, limit_bytes=limit_bytes)
        with asking_for_console(owned):
            return node, await self._hub.call(
                node, CONSOLE, params, ConsoleChunk, timeout_s=OPERATION_TIMEOUT_S
            )

    async def dirty_rate(self, domain: DomainName, seconds: float) -> DirtyRate:
        """Sample, where it runs, how fast it dirties its memory."""
        params = DirtyRateParams(domain=domain, seconds=seconds)
        wait_s = seconds + OPERATION_TIMEOUT_S
        owner = await self._owner(domain)
        with asking(owner, domain):
            return await self._hub.call(owner, DIRTY_RATE, params, DirtyRate, timeout_s=wait_s)

    # --- migrations --------------------------------------------------------------------------

    async def migrate(self, domain: DomainName, body: MigrationCreate) -> Migration:
        """Begin to migrate it. RefusedError with every reason; then nothing was changed."""
        source = await self._owner(domain)

        async def begin(params: MigrationParams) -> _Answer[Migration | RefusedError]:
            try:
                with asking(source, domain):
                    began = await self._hub.call(
                        source, MIGRATION_CREATE, params, Migration, timeout_s=OPERATION_TIMEOUT_S
                    )
            except RefusedError as error:
                return error, error.reasons
            return began, ()

        destination, found = await self._until_accepted(domain, source, body, begin)
        if isinstance(found, Migration):
            return found
        if destination in await self._nodes.read():
            raise found
        raise no_such_destination(domain, destination, found.reasons) from found

    async def check_migration(
        self, domain: DomainName, body: MigrationCreate, sample_seconds: float
    ) -> DryRun:
        """What `migrate` would be refused for, and how it would go: samples for that long."""

        async def look(params: MigrationParams) -> _Answer[Verdict]:
            found = await self._hub.call(
                source, MIGRATION_CHECK, params, Verdict, timeout_s=OPERATION_TIMEOUT_S
            )
            return found, found.reasons

        try:
            source = await self._owner(domain)
            destination, verdict = await self._until_accepted(domain, source, body, look)
        except RefusedError as error:
            return DryRun(destination=body.destination or "", refused=error.reasons)
        except WrongStateError as error:
            return DryRun(destination=body.destination or "", refused=(str(error),))
        spec, views = (await self._records.get(domain)).spec, await self._nodes.read()
        known = destination in views
        result = DryRun(
            destination=destination,
            refused=verdict.reasons,
            destination_known=known,
            engine=verdict.engine,
            engine_reason=verdict.engine_reason,
            remark=one_way(spec.cpu_model, views.get(source), views.get(destination)),
        )
        if destination == source or not known:  # Its link to itself says nothing.
            return msgspec.structs.replace(result, prediction_unknown="nothing would move")
        wanted = PredictParams(
            domain=domain, request=body.towards(destination), sample_seconds=sample_seconds
        )
        wait_s = sample_seconds + OPERATION_TIMEOUT_S
        try:
            prediction = await self._hub.call(
                source, MIGRATION_PREDICT, wanted, Prediction, timeout_s=wait_s
            )
        except FerryError as error:  # The refusals are worth having all the same.
            return msgspec.structs.replace(result, prediction_unknown=str(error))
        return msgspec.structs.replace(result, prediction=prediction)

    async def get_migration(self, id: str) -> Migration:
        """From its source while it runs and the source answers, else as the store has it."""
        stored = await self._migrations.get(id)
        if stored.ended or stored.source == self.node:
            return stored
        try:
            return await self._hub.call(
                NodeName(stored.source),
                MIGRATION_GET,
                MigrationRef(id=id),
                Migration,
                timeout_s=STATUS_TIMEOUT_S,
            )
        except FerryError:
            return stored

    async def list_migrations(self) -> Sequence[Migration]:
        """Newest first, as the store has them."""
        return await self._migrations.list_migrations()

    async def list_outlines(self) -> Sequence[MigrationOutline]:
        """The same, of each what tells whether it is under way, and how it ended."""
        return await self._migrations.list_outlines()

    async def list_own_migrations(self) -> Sequence[MigrationOutline]:
        """See `MigrationService.list_own`."""
        return await self._migrations.list_own()

    async def cancel_migration(self, id: str, by: str = "") -> Migration:
        """Ask its source to give up, for `by`. WrongStateError: too late."""
        stored = await self._migrations.get(id)
        if stored.ended:  # Its source needn't be there any more.
            raise too_late(stored, "cancel")
        return await self._hub.call(
            NodeName(stored.source),
            MIGRATION_CANCEL,
            MigrationCancel(id=id, by=by),
            Migration,
            timeout_s=OPERATION_TIMEOUT_S,
        )

    async def limit_migration(self, id: str, bandwidth_bytes_per_s: int | None) -> Migration:
        """Change the cap of one that runs. WrongStateError: it ended."""
        source = NodeName((await self._migrations.get(id)).source)
        return await self._hub.call(
            source,
            MIGRATION_LIMIT,
            MigrationLimit(id=id, bandwidth_bytes_per_s=bandwidth_bytes_per_s),
            Migration,
            timeout_s=OPERATION_TIMEOUT_S,
        )

    # --- inside ------------------------------------------------------------------------------

    async def _operate(self, domain: DomainName, method: str) -> Domain:
        owner, params = await self._owner(domain), DomainParams(domain=domain)
        with asking(owner, domain):
            await self._hub.call(owner, method, params, Done, timeout_s=OPERATION_TIMEOUT_S)
        return await self.get_domain(domain)

    async def _owner(self, domain: DomainName) -> NodeName:
        """The node that runs it. NotFoundError, or WrongStateError if nobody does."""
        await self._records.get(domain)
        owned = await self._ownership.read(domain)
        if owned is None or owned.state is not OwnershipState.RUNNING:
            raise not_running(domain)
        return NodeName(owned.owner)

    async def _until_accepted(
        self,
        domain: DomainName,
        source: NodeName,
        body: MigrationCreate,
        ask: Callable[[MigrationParams], Awaitable[_Answer[T]]],
    ) -> tuple[NodeName, T]:
        """The destination, and what the source said when it was asked about it.

        Where none is named, and one refuses, the next one is asked about (`note_refusal`).
        RefusedError: no node can take it.
        """
        refusals: dict[NodeName, str] = {}
        while True:
            destination = NodeName(body.destination or "")
            if body.destination is None:
                destination = await choose_destination(
                    domain, source, await self._nodes.read(), self.list_domains, refusals
                )
            params = MigrationParams(domain=domain, request=body.towards(destination))
            answer, reasons = await ask(params)
            if body.destination is not None or not note_refusal(destination, reasons, refusals):
                return destination, answer

    async def _migrating(self) -> Mapping[DomainName, str]:
        outlines = await self._migrations.list_outlines()
        return {DomainName(each.domain): each.id for each in outlines if not each.ended}
