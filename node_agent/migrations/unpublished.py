"""Migrations whose end an earlier agent of this node could not publish: nobody else will."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable

import msgspec

from migrator.errors import NotFoundError
from migrator.journal import MigrationJournal
from migrator.model import DomainName, Migration, MigrationState, NodeName
from node_agent.domain_records import DomainRecords
from node_agent.migrations.moments import MigrationMoments
from node_agent.migrations.publisher import Publisher


async def end_the_unpublished(
    node: NodeName,
    *,
    publisher: Publisher,
    journal: MigrationJournal,
    records: DomainRecords,
    moments: MigrationMoments,
    runs: Callable[[str], bool],
) -> None:
    """Publish each as the journal has it, and run its hooks. StoreError: some are left as they
    were. `runs`: whether the migration of that id is under way here.
    """
    for outline in await publisher.read_outlines():
        if outline.ended or outline.source != node or runs(outline.id):
            continue
        with contextlib.suppress(NotFoundError):
            await _end(await publisher.read(outline.id), publisher, journal)
            spec = (await records.get(DomainName(outline.domain))).spec
            await moments.at_unseen_end(await publisher.read(outline.id), spec)


async def _end(migration: Migration, publisher: Publisher, journal: MigrationJournal) -> None:
    entry = journal.get(migration.id)
    if entry is not None and entry.ended:
        state, error, at_s = entry.state, entry.detail or None, entry.ended_at_s
        if entry.cancel is not None:
            migration = msgspec.structs.replace(migration, cancelled_by=entry.cancel.by)
    else:
        state, at_s = MigrationState.FAILED, None
        error = "the agent ended before the migration began; nothing was changed"
    await publisher.end_without_session(migration, state, error, at_s or time.time())
