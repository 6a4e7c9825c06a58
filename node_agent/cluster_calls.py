"""What the agents ask of each other about domains and migrations: names, params, results, handlers.

domain.start/stop/pause/resume/reset/console   to the node that owns the domain
domain.dirty-rate                              likewise
domain.take-over                               to the node that is to start it
domain.statuses                                to every node that owns a running domain, or may
migration.create/check/predict/get/cancel      to the source
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Final

from migrator.figures import DirtyRate, Prediction, SampleSeconds
from migrator.model import (
    DomainName,
    DomainStatus,
    EngineKind,
    Migration,
    MigrationRequest,
    NodeName,
    OwnershipRecord,
)
from migrator.ports import Struct
from node_agent.domain_takeover import DomainTakeover
from node_agent.domains import ConsoleChunk, DomainService
from node_agent.migrations.service import MigrationService
from node_agent.peers.hub import PeerHub

START: Final = "domain.start"
TAKE_OVER: Final = "domain.take-over"
STOP: Final = "domain.stop"
PAUSE: Final = "domain.pause"
RESUME: Final = "domain.resume"
RESET: Final = "domain.reset"
CONSOLE: Final = "domain.console"
DIRTY_RATE: Final = "domain.dirty-rate"
STATUSES: Final = "domain.statuses"
MIGRATION_CREATE: Final = "migration.create"
MIGRATION_CHECK: Final = "migration.check"
MIGRATION_PREDICT: Final = "migration.predict"
MIGRATION_GET: Final = "migration.get"
MIGRATION_CANCEL: Final = "migration.cancel"
MIGRATION_LIMIT: Final = "migration.limit"
STATUS_TIMEOUT_S: Final = 3.0
"""More than a driver takes to give one domain up: else its node, and all that runs there, would
seem to be silent because of it."""


class Nothing(Struct, frozen=True, kw_only=True):
    """No params."""


class Done(Struct, frozen=True, kw_only=True):
    """No result but that it was done."""


class Stopped(Done, frozen=True, kw_only=True):
    """Of a stop."""

    forced: bool = False
    """The guest didn't power itself off in time. An older agent doesn't say so."""


class DomainParams(Struct, frozen=True, kw_only=True):
    domain: DomainName


class TakeoverParams(Struct, frozen=True, kw_only=True):
    domain: DomainName
    powered_off: NodeName | None
    user: str = ""
    """Who asked."""


class StopParams(Struct, frozen=True, kw_only=True):
    domain: DomainName
    timeout_s: float
    in_post_copy: bool = False
    """Also one that moved here, and lacks pages that don't come in that time."""


class ConsoleParams(Struct, frozen=True, kw_only=True):
    domain: DomainName
    offset: int | None
    limit_bytes: int


class Statuses(Struct, frozen=True, kw_only=True):
    statuses: tuple[DomainStatus, ...]


class MigrationParams(Struct, frozen=True, kw_only=True):
    domain: DomainName
    request: MigrationRequest


class DirtyRateParams(Struct, frozen=True, kw_only=True):
    domain: DomainName
    seconds: SampleSeconds


class PredictParams(Struct, frozen=True, kw_only=True):
    domain: DomainName
    request: MigrationRequest
    sample_seconds: SampleSeconds


class MigrationRef(Struct, frozen=True, kw_only=True):
    id: str


class MigrationCancel(Struct, frozen=True, kw_only=True):
    id: str
    by: str = ""
    """Who wants it."""


class MigrationLimit(Struct, frozen=True, kw_only=True):
    id: str
    bandwidth_bytes_per_s: int | None


class Reasons(Struct, frozen=True, kw_only=True):
    reasons: tuple[str, ...]


class Verdict(Reasons, frozen=True, kw_only=True):
    """What speaks against a migration, and which engine it would take."""

    engine: EngineKind
    engine_reason: str


async def guests_of(hub: PeerHub, node: NodeName) -> Sequence[DomainStatus]:
    """Every domain of that node's hypervisor. PeerError: it doesn't answer."""
    wait_s = STATUS_TIMEOUT_S
    return (await hub.call(node, STATUSES, Nothing(), Statuses, timeout_s=wait_s)).statuses


class ClusterCalls:
    """This node's answers to those calls. `register` once, before the hub starts."""

    def __init__(
        self, domains: DomainService, takeover: DomainTakeover, migrations: MigrationService
    ) -> None:
        self._domains = domains
        self._takeover = takeover
        self._migrations = migrations

    def register(self, hub: PeerHub) -> None:
        """Serve every method of this module."""
        hub.handle(START, DomainParams, self._start)
        hub.handle(TAKE_OVER, TakeoverParams, self._take_over)
        hub.handle(STOP, StopParams, self._stop)
        hub.handle(PAUSE, DomainParams, self._pause)
        hub.handle(RESUME, DomainParams, self._resume)
        hub.handle(RESET, DomainParams, self._reset)
        hub.handle(CONSOLE, ConsoleParams, self._console)
        hub.handle(STATUSES, Nothing, self._statuses)
        hub.handle(MIGRATION_CREATE, MigrationParams, self._create)
        hub.handle(MIGRATION_CHECK, MigrationParams, self._check)
        hub.handle(DIRTY_RATE, DirtyRateParams, self._dirty_rate)
        hub.handle(MIGRATION_PREDICT, PredictParams, self._predict)
        hub.handle(MIGRATION_GET, MigrationRef, self._get)
        hub.handle(MIGRATION_CANCEL, MigrationCancel, self._cancel)
        hub.handle(MIGRATION_LIMIT, MigrationLimit, self._limit)

    async def _start(self, _: NodeName, params: DomainParams) -> OwnershipRecord:
        return await self._domains.start(params.domain)

    async def _take_over(self, _: NodeName, params: TakeoverParams) -> OwnershipRecord:
        return await self._takeover.take_over(params.domain, params.powered_off, user=params.user)

    async def _stop(self, _: NodeName, params: StopParams) -> Stopped:
        clock, timeout_s = asyncio.get_running_loop().time, params.timeout_s
        began_s = clock()
        if params.in_post_copy and await self._migrations.stop_in_post_copy(
            params.domain, timeout_s
        ):
            return Stopped(forced=True)
        left_s = max(0.0, timeout_s - (clock() - began_s))
        return Stopped(forced=not await self._domains.stop(params.domain, timeout_s=left_s))

    async def _pause(self, _: NodeName, params: DomainParams) -> Done:
        await self._domains.pause(params.domain)
        return Done()

    async def _resume(self, _: NodeName, params: DomainParams) -> Done:
        await self._domains.resume(params.domain)
        return Done()

    async def _reset(self, _: NodeName, params: DomainParams) -> Done:
        await self._domains.reset(params.domain)
        return Done()

    async def _console(self, _: NodeName, params: ConsoleParams) -> ConsoleChunk:
        return await self._domains.console(
            params.domain, offset=params.offset, limit_bytes=params.limit_bytes
        )

    async def _statuses(self, _: NodeName, params: Nothing) -> Statuses:
        return Statuses(statuses=tuple(await self._domains.statuses()))

    async def _create(self, _: NodeName, params: MigrationParams) -> Migration:
        return await self._migrations.create(params.domain, params.request)

    async def _check(self, _: NodeName, params: MigrationParams) -> Verdict:
        reasons = await self._migrations.check(params.domain, params.request)
        choice = await self._migrations.choose_engine(params.domain, params.request)
        return Verdict(reasons=tuple(reasons), engine=choice.engine, engine_reason=choice.reason)

    async def _dirty_rate(self, _: NodeName, params: DirtyRateParams) -> DirtyRate:
        return await self._migrations.dirty_rate(params.domain, params.seconds)

    async def _predict(self, _: NodeName, params: PredictParams) -> Prediction:
        choice = await self._migrations.choose_engine(params.domain, params.request)
        request = choice.apply_to(params.request)
        return await self._migrations.predict(params.domain, request, params.sample_seconds)

    async def _get(self, _: NodeName, params: MigrationRef) -> Migration:
        return await self._migrations.get(params.id)

    async def _limit(self, _: NodeName, params: MigrationLimit) -> Migration:
        return await self._migrations.limit(params.id, params.bandwidth_bytes_per_s)

    async def _cancel(self, _: NodeName, params: MigrationCancel) -> Migration:
        return await self._migrations.cancel(params.id, params.by)
