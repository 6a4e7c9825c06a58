"""What this node does for its migrations beyond the bare drivers: `migrator.runner.Site`."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any, Final, TypeVar

from migrator.errors import RefusedError, StoreError
from migrator.hold_points import hold
from migrator.model import (
    DomainName,
    DomainSpec,
    EngineKind,
    FencingToken,
    MigrationState,
    NodeName,
    Role,
)
from migrator.ports import FabricDriver, HypervisorDriver, OwnershipStore, Struct
from migrator.runner import Session, Site
from migrator.session.destination import DestinationSession
from migrator.session.messages import SessionMessage
from migrator.session.source import SourceSession
from migrator.session.vocabulary import LeavePart
from node_agent.domains import DomainService
from node_agent.migrations.arrivals import Arrivals
from node_agent.migrations.checks import DestinationCheck, Inspection
from node_agent.migrations.cutover import CutoverService
from node_agent.migrations.moments import MigrationMoments
from node_agent.migrations.path_check import BEGIN_S, KNOWN_S, PathCheck
from node_agent.migrations.storage_check import StorageCheck
from node_agent.migrations.witnesses import Move
from node_agent.peers.hub import PeerHub

T = TypeVar("T")

log = logging.getLogger(__name__)

MESSAGE = "migration.message"
SEND_S: Final = 2.0
STORE_GAP_S: Final = 0.5
"""Between looks whether the store answers again."""


class Envelope(Struct, frozen=True, kw_only=True):
    """A session's message on its way. `to` is the receiving side's role."""

    migration_id: str
    to: Role
    message: SessionMessage


class NodeSite(Site):
    """See the module."""

    def __init__(
        self,
        *,
        hub: PeerHub,
        hypervisor: HypervisorDriver,
        fabric: FabricDriver,
        domains: DomainService,
        check: DestinationCheck,
        moments: MigrationMoments,
        ownership: OwnershipStore,
        cutover: CutoverService,
        arrivals: Arrivals | None = None,
        storage: StorageCheck | None = None,
    ) -> None:
        self._hub = hub
        self._hypervisor = hypervisor
        self._fabric = fabric
        self._domains = domains
        self._check = check
        self._moments = moments
        self._ownership = ownership
        self._cutover = cutover
        self._arrivals = arrivals or Arrivals(hub)
        self._path = PathCheck(hub, fabric)
        self._storage = storage or StorageCheck(domains.node, hub, check.pools)

    def open(self) -> None:
        """Serve other nodes' questions."""
        self._arrivals.register()
        self._storage.register()
        self._cutover.register()
        self._path.register()

    async def close(self) -> None:
        """End what follows migrations that are over."""
        await self._path.close()
        await self._cutover.close()

    async def path_reasons(
        self, spec: DomainSpec, destination: NodeName, *, to_begin: bool = False
    ) -> list[str]:
        """What the network between here and there says against a migration.

        `to_begin`: one that will `renew_path`, so what was wide enough lately will do.
        """
        return await self._path.reasons(spec, destination, BEGIN_S if to_begin else KNOWN_S)

    def renew_path(self, session: SourceSession) -> None:
        """Measure again what it began with; `leave` waits for that."""
        self._path.renew(session.migration_id, session.spec, NodeName(session.destination))

    async def prepare_incoming(
        self,
        session: DestinationSession,
        device_channel: Path,
        on_memory: Callable[[], None],
    ) -> None:
        with self._arrivals.preparing(session.migration_id):
            await self._prepare_incoming(session, device_channel, on_memory)

    async def _prepare_incoming(
        self,
        session: DestinationSession,
        device_channel: Path,
        on_memory: Callable[[], None],
    ) -> None:
        spec, domain = session.spec, DomainName(session.domain)  # Claimed when it was admitted.
        paged = session.request.engine is not EngineKind.NATIVE
        try:
            if paged and session.pages_first and await self._hypervisor.make_memory_ahead(spec):
                on_memory()  # Its volumes, taps and hypervisor take longer than the first pages.
            await self._refuse_unless_fit(session)
            launch, undo = await self._domains.build_launch(spec, FencingToken(session.next_token))
        except BaseException:
            await self._hypervisor.drop_memory_ahead(domain)
            raise
        try:
            async with _beside(self._cutover.prepare_arrival(_move(session))):
                await self._hypervisor.start_incoming(launch)
            await hold(session.role, "arrive")
            undo.release()
            if paged:
                await self._hypervisor.receive_device_state(domain, device_channel)
        except BaseException:
            undo.release()  # Also where the hypervisor can't be ended now: that is tried again.
            await self._hypervisor.drop_memory_ahead(domain)
            await self._hypervisor.destroy(domain)
            await undo()
            raise

    async def _refuse_unless_fit(self, session: DestinationSession) -> None:
        """The source compared its hypervisor when it asked; memory and bridges change by the
        second. RefusedError.
        """
        asked = Inspection(
            spec=session.spec,
            source=await self._hypervisor.capabilities(),
            engine=session.request.engine,
        )
        if reasons := await self._check.reasons(asked):
            raise RefusedError(f"{session.destination} can't take domain {session.domain}", reasons)

    async def leave(self, session: SourceSession, part: LeavePart = LeavePart.ALL) -> str:
        await self._arrivals.wait(session.destination, session.migration_id)
        destination = NodeName(session.destination)
        narrow = await self._path.renewed(session.migration_id, session.spec, destination)
        if narrow:
            raise RefusedError(narrow[0], narrow)
        said = ""
        if part is not LeavePart.REST:
            report = await _answered(session, lambda: self._moments.before_switchover(session))
            if report.forbidden is not None:
                raise RefusedError(report.forbidden, [report.forbidden])
            said = report.sentence
        if part is LeavePart.HOOKS:
            return said
        # Last, and as late as can be: what answers now does so in the next moment, too.
        domain = DomainName(session.domain)
        record = await _answered(session, lambda: self._ownership.read(domain))
        if record != session.record_before:
            reason = f"domain {domain} is not {session.source}'s any more: {record}"
            raise RefusedError(reason, [reason])
        await self._storage.wait(session.spec, destination, FencingToken(session.next_token))
        return said

    async def destroy(self, session: Session) -> None:
        if not self._is_ours(session):
            return
        if session.role is Role.DESTINATION:
            self._cutover.gone(_move(session))
        await self._hypervisor.destroy(DomainName(session.domain))

    async def release(self, session: Session) -> None:
        if self._is_ours(session):
            token = session.token if session.role is Role.SOURCE else session.next_token
            await self._domains.tear_down(session.spec, FencingToken(token))

    def _is_ours(self, session: Session) -> bool:
        """False: what is here of the domain isn't this migration's copy."""
        if session.role is Role.SOURCE:
            return True
        claim = self._domains.locks.migration_of(DomainName(session.domain))
        return claim == session.migration_id

    async def fence(self, session: Session, token: FencingToken) -> str:
        return await self._domains.fence(session.spec, token)

    async def announce(self, session: Session) -> None:
        """Also where a rollback resumed the guest at the source."""
        if session.role is Role.SOURCE:
            await self._fabric.announce(DomainName(session.domain), session.spec.nics)
        else:
            await self._cutover.announce(_move(session))

    async def prepare_departure(self, session: Session) -> None:
        await self._cutover.prepare_departure(_move(session))

    async def depart(self, session: Session) -> None:
        await self._cutover.depart(_move(session))

    async def settle(self, session: Session) -> None:
        """A source has ended. Before that is published, which may take a minute: frames for a guest
        that stays may go the other way until then.
        """
        await self._path.forget(session.migration_id)
        if session.state is not MigrationState.COMPLETED:
            await self._cutover.stays(_move(session))

    def left(self, session: Session) -> None:
        """After that: the network's last part towards there, which amends what is published."""
        if session.state is MigrationState.COMPLETED:
            self._cutover.left(_move(session))

    async def silence(self, session: Session) -> None:
        """End a source's own announcements, so that none contradicts the destination's."""
        await self._fabric.announce(DomainName(session.domain), ())

    async def send(
        self, node: NodeName, migration_id: str, to: Role, message: SessionMessage
    ) -> None:
        envelope = Envelope(migration_id=migration_id, to=to, message=message)
        await self._hub.notify(node, MESSAGE, envelope, timeout_s=SEND_S)


async def _answered(session: SourceSession, ask: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """What the store answers `ask`, which has done nothing where it raises StoreError.

    The handoff is one write to the store: while it doesn't answer, the guest runs on here.
    """
    said = False
    while True:
        try:
            return await ask()
        except StoreError as error:
            if not said:
                log.warning("migration %s waits: %s", session.migration_id, error)
            said = True
            await asyncio.sleep(STORE_GAP_S)


@contextlib.asynccontextmanager
async def _beside(work: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Do `work`, which doesn't fail, while the block runs; it is ended where the block fails."""
    task = asyncio.create_task(work)
    try:
        yield
        await task
    finally:
        task.cancel()
        await asyncio.wait({task})


def _move(session: Session) -> Move:
    return Move(
        migration_id=session.migration_id,
        domain=DomainName(session.domain),
        source=session.source,
        destination=session.destination,
        nics=session.spec.nics,
    )
