"""The moments of a migration at which its source runs hooks.

before-migration    between `create` and the session's Begin
before-switchover   the session asks for leave (`NodeSite.leave`)
after-resume        the session has heard that the destination runs the guest
after-migration, on-failure    at its end, also one that only the next agent saw
"""

from __future__ import annotations

import logging

from migrator.errors import FerryError
from migrator.model import DomainSpec, Migration, MigrationState, Phase
from migrator.session.source import SourceSession
from migrator.steady_clock import SteadyClock
from node_agent.hooks.model import HookCall, HookPoint, HookReport
from node_agent.hooks.service import HookService

log = logging.getLogger(__name__)


class MigrationMoments:
    """See the module. Each moment of a session is had once."""

    def __init__(self, hooks: HookService) -> None:
        self._hooks = hooks
        self._resumed: set[str] = set()

    async def before_migration(self, session: SourceSession) -> str | None:
        """Why it must not begin; None: it may."""
        try:
            report = await self._run(session, HookPoint.BEFORE_MIGRATION)
        except FerryError as error:
            return f"its hooks can't be known: {error}"
        return report.forbidden

    async def before_switchover(self, session: SourceSession) -> HookReport:
        """StoreError: the hooks can't be known; none was run."""
        call = call_of(session.view(), session.spec, HookPoint.BEFORE_SWITCHOVER)
        return await self._hooks.run(call, session.spec)  # The session notes it itself.

    def newly_resumed(self, session: SourceSession) -> bool:
        """Whether the destination runs the guest, and this is the first time to ask."""
        if not session.destination_runs or session.migration_id in self._resumed:
            return False
        self._resumed.add(session.migration_id)
        return True

    async def after_resume(self, session: SourceSession) -> None:
        """Never raises."""
        await self._quietly(session, HookPoint.AFTER_RESUME)

    async def at_end(self, session: SourceSession) -> bool:
        """Whether any hook was run; never raises."""
        self._resumed.discard(session.migration_id)
        completed = session.state is MigrationState.COMPLETED
        point = HookPoint.AFTER_MIGRATION if completed else HookPoint.ON_FAILURE
        return await self._quietly(session, point)

    async def at_unseen_end(self, migration: Migration, spec: DomainSpec) -> None:
        """For a migration whose session ended with an earlier agent. Never raises."""
        completed = migration.state is MigrationState.COMPLETED
        point = HookPoint.AFTER_MIGRATION if completed else HookPoint.ON_FAILURE
        try:
            await self._hooks.run(call_of(migration, spec, point), spec)
        except FerryError as error:
            log.error("migration %s: hooks of %s were not run: %s", migration.id, point, error)

    async def _quietly(self, session: SourceSession, point: HookPoint) -> bool:
        try:
            return bool((await self._run(session, point)).results)
        except FerryError as error:
            name = session.migration_id
            log.error("migration %s: hooks of %s were not run: %s", name, point, error)
            return False

    async def _run(self, session: SourceSession, point: HookPoint) -> HookReport:
        clock = SteadyClock()
        started_s = clock.now_s
        report = await self._hooks.run(call_of(session.view(), session.spec, point), session.spec)
        if report.results:
            session.timeline.append(
                Phase(
                    name=f"hooks {point}",
                    started_at_s=started_s,
                    seconds=clock.now_s - started_s,
                    detail=report.sentence,
                )
            )
        return report


def call_of(migration: Migration, spec: DomainSpec, point: HookPoint) -> HookCall:
    """What hooks are told of this moment."""
    return HookCall(
        point=point,
        node=migration.source,
        domain=migration.domain,
        destination=migration.destination,
        migration=migration.id,
        addresses=tuple(address for nic in spec.nics for address in nic.addresses),
        reason=migration.error if point is HookPoint.ON_FAILURE else None,
    )
