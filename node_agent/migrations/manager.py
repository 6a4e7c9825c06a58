"""The migrations of this node: makes their runners, delivers their messages, publishes their state.

A migration has a runner on each of its two nodes. Both journal; the source alone publishes the
migration resource. After a restart, every journalled migration that has not ended gets a runner
again, whose session finds out what is true.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import Iterable, Sequence
from typing import Final

from migrator.engine_driver import EngineSettings
from migrator.errors import FerryError, RefusedError
from migrator.figures import DirtyRate, Prediction
from migrator.journal import MigrationJournal
from migrator.journal_entry import answer_without_session, restore
from migrator.left_tracking import clear_tracking
from migrator.model import (
    ENDED,
    DomainName,
    DomainSpec,
    Migration,
    MigrationId,
    MigrationRequest,
    MigrationState,
    NodeName,
    Role,
)
from migrator.ports import HypervisorDriver, OwnershipStore
from migrator.runner import Runner, Session
from migrator.session import vocabulary as v
from migrator.session.destination import DestinationSession
from migrator.session.messages import Prepare, Refused
from migrator.session.source import SourceSession
from node_agent.background import Asides
from node_agent.cluster_calls import Reasons
from node_agent.domain_records import DomainRecords
from node_agent.domains import DomainService
from node_agent.events import EventKind, EventLog
from node_agent.migrations.admission import Admissions
from node_agent.migrations.checks import (
    DestinationCheck,
    Inspection,
    claim_reasons,
    node_reasons,
    refuse_unless_running,
    state_reasons,
)
from node_agent.migrations.endings import too_late
from node_agent.migrations.engine_choice import EngineChoice, EngineChooser
from node_agent.migrations.forecast import Forecaster
from node_agent.migrations.moments import MigrationMoments
from node_agent.migrations.outline import MigrationOutline
from node_agent.migrations.post_copy_stop import stop_in_post_copy
from node_agent.migrations.publisher import Publisher
from node_agent.migrations.redials import Redials
from node_agent.migrations.room import at_source, in_state_directory, room_reasons
from node_agent.migrations.service import MigrationService
from node_agent.migrations.site import MESSAGE, Envelope, NodeSite
from node_agent.migrations.standstill import Standstill
from node_agent.migrations.unpublished import MigrationEnds
from node_agent.nodes import NodeRegistry
from node_agent.peers.hub import PeerHub

log = logging.getLogger(__name__)

INSPECT: Final = "migration.inspect"
INSPECT_S: Final = 10.0
_NOTED_S: Final = 1.0
"""That the answer to a cancel waits for the journal."""
_CLOSE_S: Final = 5.0


class MigrationManager(MigrationService):
    """See the module. `restore` before the peers may call, `open` when they may."""

    def __init__(
        self,
        node: NodeName,
        *,
        hub: PeerHub,
        hypervisor: HypervisorDriver,
        ownership: OwnershipStore,
        journal: MigrationJournal,
        domains: DomainService,
        records: DomainRecords,
        nodes: NodeRegistry,
        events: EventLog,
        publisher: Publisher,
        check: DestinationCheck,
        site: NodeSite,
        engine: EngineSettings,
        forecaster: Forecaster,
        moments: MigrationMoments,
        boot_id: str,
    ) -> None:
        self.node = node
        self._hub = hub
        self._hypervisor = hypervisor
        self._ownership = ownership
        self._journal = journal
        self._domains = domains
        self._records = records
        self._nodes = nodes
        self._events = events
        self._publisher = publisher
        self._check = check
        self._site = site
        self._engine = engine
        self._forecaster = forecaster
        self._moments = moments
        self._chooser = EngineChooser(node, hypervisor=hypervisor, nodes=nodes)
        self._boot_id = boot_id
        self._runners: dict[str, Runner] = {}
        self._admissions = Admissions(domains, hypervisor, ownership)
        self._restored: list[Runner] = []
        self._asides = Asides(log)
        self._ends = MigrationEnds(
            node,
            publisher=publisher,
            journal=journal,
            records=records,
            moments=moments,
            is_alive=self._is_alive,
            aside=self._asides.add,
        )
        self.standstill = Standstill(lambda: (r.session.state for r in self._runners.values()))
        self._redials = Redials(hub, lambda node: bool(self.active_with(node)))

    def incoming(self) -> Iterable[DomainSpec]:
        """The domains that are on their way here."""
        sessions = (runner.session for runner in self._runners.values())
        return [each.spec for each in sessions if each.role is Role.DESTINATION]

    # --- life --------------------------------------------------------------------------------

    async def restore(self) -> set[DomainName]:
        """Make a runner for each journalled migration that has not ended; the domains are claimed.

        Call it before `DomainService.open`, which leaves claimed domains alone.
        """
        claimed: set[DomainName] = set()
        for entry in await self._journal.open():
            if entry.ended:
                continue
            session = restore(entry, boot_id=self._boot_id)
            domain = DomainName(session.domain)
            await self._domains.locks.claim_for_migration(domain, MigrationId(entry.migration_id))
            claimed.add(domain)
            if isinstance(session, SourceSession):
                await self._take_up(session)
            self._restored.append(self._make_runner(session))
        return claimed

    async def _take_up(self, session: SourceSession) -> None:
        """What was published before the restart stays part of the migration's history."""
        with contextlib.suppress(FerryError):
            published = await self._publisher.read(session.migration_id)
            session.take_up(published, await self._nodes.last_beat_at_s())

    async def open(self, adopted: Sequence[DomainName]) -> None:
        """Take calls and messages, and let the restored migrations go on.

        The other adopted guests are rid of what was left by engines killed with the last agent.
        """
        self._hub.handle(MESSAGE, Envelope, self._on_message)
        self._hub.handle(INSPECT, Inspection, self._on_inspect)
        self._hub.on_peer_change(self._on_peer_change)
        self._site.open()
        self._publisher.open()
        self._engine.spares.refill()
        restored, self._restored = self._restored, []
        for runner in restored:
            runner.feed(v.Recover())
        self._asides.add(self._clear_tracking(adopted))
        self._ends.open()

    def _is_alive(self, outline: MigrationOutline) -> bool:
        """Also one that begins, and is claimed but has no runner yet."""
        claim = self._domains.locks.migration_of(DomainName(outline.domain))
        return outline.id in self._runners or outline.id == claim

    async def _clear_tracking(self, domains: Sequence[DomainName]) -> None:
        if (await self._hypervisor.capabilities()).paged_engine:
            for domain in domains:
                if self._domains.locks.migration_of(domain) is None:
                    await clear_tracking(self._hypervisor.memory, domain)

    async def close(self) -> None:
        """Let go: engines end, guests go on, the journal tells the next agent."""
        await self._forecaster.close()
        self._redials.close()
        for runner in list(self._runners.values()):
            await runner.close()
        await self._ends.close()
        if self._asides.tasks:
            _, late = await asyncio.wait(self._asides.tasks, timeout=_CLOSE_S)
            for task in late:  # Hooks that take longer: they come again with the next agent.
                task.cancel()
        await self._site.close()
        await self._engine.spares.close()
        await self._publisher.close()
        await self._journal.close()

    # --- the service -------------------------------------------------------------------------

    async def create(self, domain: str, request: MigrationRequest) -> Migration:
        name = DomainName(domain)
        reasons = await self._reasons(domain, request, to_begin=True)
        if reasons:
            raise RefusedError(f"domain {domain} was not migrated: {reasons[0]}", reasons)
        choice = await self._chooser.choose(name, request)
        request = choice.apply_to(request)
        migration = MigrationId(secrets.token_hex(6))
        await self._domains.locks.claim_for_migration(name, migration)
        try:
            await self._forecaster.interrupt(name)
            await refuse_unless_running(self._hypervisor, name)
            owned = await self._domains.ownership.owned_here(name)
            await self._domains.ownership.older.refuse_move(name, owned)
            spec = (await self._records.get(name)).spec
            session = SourceSession(
                migration_id=migration,
                spec=spec,
                source=self.node,
                destination=NodeName(request.destination),
                token=owned.token,
                request=request,
                created_at_s=time.time(),
                prediction=await self._forecaster.at_start(name, request),
            )
            choice.note_in(session)
            try:
                await self._publisher.write(session.view())
            except BaseException:  # It may have been carried out.
                self._ends.look_again(migration)
                raise
        except BaseException:
            self._domains.locks.release_from_migration(name, migration)
            raise
        self._events.emit(
            EventKind.MIGRATION_STARTED,
            f"domain {domain}: migration from {self.node} to {request.destination} began",
            domain=domain,
            migration=migration,
        )
        self._asides.add(self._begin(self._make_runner(session), session))
        return session.view()

    async def _begin(self, runner: Runner, session: SourceSession) -> None:
        """Let it begin, unless a hook forbids it, or it was cancelled while they took time."""
        reason = await self._moments.before_migration(session)
        if reason is not None:
            runner.feed(v.LeaveRefused(reason=reason))
        elif session.state is MigrationState.CREATED:
            self._site.renew_path(session)
            runner.feed(v.Begin())
            await self._site.silence(session)

    async def check(self, domain: str, request: MigrationRequest) -> Sequence[str]:
        return await self._reasons(domain, request, to_begin=False)

    async def _reasons(
        self, domain: str, request: MigrationRequest, *, to_begin: bool
    ) -> Sequence[str]:
        name, destination = DomainName(domain), NodeName(request.destination)
        spec = (await self._records.get(name)).spec
        reasons: list[str] = []
        await self._domains.locks.settle(name)
        reasons += claim_reasons(self._domains.locks, name)
        if not reasons:
            reasons += state_reasons(name, (await self._hypervisor.inspect(name)).state)
        room = await room_reasons(self._journal.folder)
        away = await self._domains.storage_troubles(spec)
        reasons += [f"{at_source(self.node)}{each}" for each in (*room, *away)]
        own = await self._hypervisor.capabilities()
        choice = await self._chooser.choose(name, request)
        reasons += choice.refused
        no_place = node_reasons(self.node, destination, await self._nodes.read())
        if no_place:
            return reasons + no_place
        try:
            tls = await in_state_directory(self._journal.folder, self._engine.tls) is not None
        except FerryError as error:
            return [*reasons, f"{self.node} can't send memory: {error}"]
        inspection = await self._check.inspection(spec, own, choice.engine, tls)
        path = self._site.path_reasons(spec, destination, to_begin=to_begin)
        there, way = await asyncio.gather(self._reasons_there(destination, inspection), path)
        return [*reasons, *there] or way

    async def _reasons_there(self, destination: NodeName, inspection: Inspection) -> list[str]:
        try:
            answer = await self._hub.call(
                destination, INSPECT, inspection, Reasons, timeout_s=INSPECT_S
            )
        except FerryError as error:
            return [f"node {destination} doesn't answer: {error}"]
        return [f"node {destination}: {reason}" for reason in answer.reasons]

    async def choose_engine(self, domain: str, request: MigrationRequest) -> EngineChoice:
        return await self._chooser.choose(DomainName(domain), request)

    async def dirty_rate(self, domain: str, seconds: float) -> DirtyRate:
        return await self._forecaster.dirty_rate(DomainName(domain), seconds)

    async def predict(
        self, domain: str, request: MigrationRequest, sample_seconds: float
    ) -> Prediction:
        return await self._forecaster.predict(DomainName(domain), request, sample_seconds)

    async def get(self, id: str) -> Migration:
        runner = self._runners.get(id)
        if runner is not None and isinstance(runner.session, SourceSession):
            return runner.session.view(runner.unheard_s)
        return self._ends.get(id) or await self._publisher.read(id)

    async def list_migrations(self) -> Sequence[Migration]:
        return await self._publisher.read_all()

    async def list_outlines(self) -> Sequence[MigrationOutline]:
        return await self._publisher.read_outlines()

    async def list_own(self) -> Sequence[MigrationOutline]:
        return await self._publisher.read_own(self.node)

    async def limit(self, id: str, bandwidth_bytes_per_s: int | None) -> Migration:
        runner = self._runners.get(id)
        if runner is None or not isinstance(runner.session, SourceSession):
            raise too_late(await self.get(id), "change")
        runner.limit_bandwidth(bandwidth_bytes_per_s)
        return runner.session.view()

    async def cancel(self, id: str, by: str = "") -> Migration:
        runner = self._runners.get(id)
        if runner is None or not isinstance(runner.session, SourceSession):
            raise too_late(await self.get(id), "cancel")
        session = runner.session
        if not session.cancellable and session.state is not MigrationState.CANCELLING:
            raise too_late(session.view(), "cancel")
        runner.feed(v.CancelRequested(reason=f"cancelled by {by or 'request'}", by=by))
        await runner.journalled(_NOTED_S)
        return session.view()

    async def stop_in_post_copy(self, domain: str, timeout_s: float) -> bool:
        runners = list(self._runners.values())
        name = DomainName(domain)
        return await stop_in_post_copy(name, runners, self._domains, timeout_s=timeout_s)

    # --- runners -----------------------------------------------------------------------------

    def _make_runner(self, session: Session) -> Runner:
        runner = Runner(
            session,
            hypervisor=self._hypervisor,
            ownership=self._ownership,
            journal=self._journal,
            site=self._site,
            engine=self._engine,
            boot_id=self._boot_id,
            on_change=self._on_change,
            on_finish=self._on_finish,
        )
        self._runners[session.migration_id] = runner
        return runner

    def _on_change(self, runner: Runner) -> None:
        session = runner.session
        self.standstill.changed()
        if session.over:
            self._domains.locks.end_migration(
                DomainName(session.domain), MigrationId(session.migration_id)
            )
        if isinstance(runner.session, SourceSession):
            self._publisher.changed(runner.session)
            if self._moments.newly_resumed(runner.session):
                self._asides.add(self._moments.after_resume(runner.session))

    def _on_finish(self, runner: Runner) -> None:
        self._asides.add(self._end(runner))

    async def _end(self, runner: Runner) -> None:
        session = runner.session
        try:
            await runner.close()
            self._runners.pop(session.migration_id, None)
            if isinstance(session, SourceSession):
                await self._site.settle(session)
                await self._ends.end(session)
                self._site.left(session)
                self._forecaster.ended(session.view())
            if not self._runners:
                self._engine.spares.refill_later()
        finally:
            self._runners.pop(session.migration_id, None)
            self._domains.locks.release_from_migration(
                DomainName(session.domain), MigrationId(session.migration_id)
            )

    # --- what peers say ----------------------------------------------------------------------

    async def _on_inspect(self, _: NodeName, inspection: Inspection) -> Reasons:
        return Reasons(reasons=tuple(await self._check.reasons(inspection)))

    async def _on_message(self, sender: NodeName, envelope: Envelope) -> None:
        runner = self._runners.get(envelope.migration_id)
        if runner is not None:
            if runner.peer == sender and runner.session.role is envelope.to:
                runner.feed(v.Received(message=envelope.message))
            return
        entry = self._journal.get(envelope.migration_id)
        if isinstance(envelope.message, Prepare) and entry is None:
            await self._begin_destination(sender, envelope.migration_id, envelope.message)
            return
        answer = answer_without_session(envelope.to, entry, envelope.message)
        if answer is not None:
            to = Role.SOURCE if envelope.to is Role.DESTINATION else Role.DESTINATION
            await self._site.send(sender, envelope.migration_id, to, answer)

    async def _begin_destination(self, sender: NodeName, id: str, prepare: Prepare) -> None:
        reasons = await self._admissions.admit(MigrationId(id), sender, prepare)
        if reasons is None:
            return
        if reasons:
            await self._site.send(sender, id, Role.SOURCE, Refused(reasons=tuple(reasons)))
            return
        session = DestinationSession.asked(
            prepare, id, source=sender, here=self.node, created_at_s=time.time()
        )
        self._make_runner(session).feed(v.Begin())

    def _on_peer_change(self, node: NodeName, connected: bool) -> None:
        event: v.Event = v.PeerBack() if connected else v.PeerLost()
        for runner in self.active_with(node):
            runner.feed(event)
        if not connected:
            self._redials.begin(node)

    def active_with(self, node: NodeName) -> list[Runner]:
        return [
            runner
            for runner in self._runners.values()
            if runner.peer == node and runner.session.state not in ENDED
        ]
