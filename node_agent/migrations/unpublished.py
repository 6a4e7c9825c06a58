"""How this node's migrations ended, told until the store has it: nobody else will publish it.

    its own ends                   as their sessions have them
    what an earlier agent left     as the journal has it
    what a failed `create` left    it never began: its write may have been carried out all the same

Until it is published a migration is under way for all who ask: it is waited for, its node can't be
removed, and a drain doesn't end. Hooks of the end are run after that, once.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Coroutine
from typing import Any, Final

import msgspec

from migrator.errors import FerryError, NotFoundError
from migrator.journal import MigrationJournal
from migrator.model import DomainName, Migration, MigrationState, NodeName
from migrator.session.source import SourceSession
from node_agent.background import Background
from node_agent.domain_records import DomainRecords
from node_agent.migrations.moments import MigrationMoments
from node_agent.migrations.outline import MigrationOutline
from node_agent.migrations.publisher import Publisher

log = logging.getLogger(__name__)

AGAIN_S: Final = 30.0
"""Before each look but the first. A write of unknown outcome has landed by then, or never will: a
store gives up within seconds what it can't carry out. A look reads all outlines."""


class MigrationEnds:
    """See the module. `open` begins with what an earlier agent left; `close` ends what is tried.

    `is_alive`: whether the migration is under way here. `aside` takes hooks, which may take long.
    """

    def __init__(
        self,
        node: NodeName,
        *,
        publisher: Publisher,
        journal: MigrationJournal,
        records: DomainRecords,
        moments: MigrationMoments,
        is_alive: Callable[[MigrationOutline], bool],
        aside: Callable[[Coroutine[Any, Any, None]], None],
    ) -> None:
        self._node = node
        self._publisher = publisher
        self._journal = journal
        self._records = records
        self._moments = moments
        self._is_alive = is_alive
        self._aside = aside
        self._sessions: dict[str, SourceSession] = {}
        """That have ended and aren't published."""
        self._unseen: dict[str, Migration] = {}
        """As they are to be published. A write that failed may be in the store all the same."""
        self._late: set[str] = set()
        """Of `_sessions` those that `Publisher.end` has given up."""
        self._never_began: set[str] = set()
        """No hook of theirs was run, and none is at their end: it may be another's turn by then."""
        self._asked = asyncio.Event()
        self._task = Background("migration-ends")

    def open(self) -> None:
        self._task.start(self._run())

    async def close(self) -> None:
        await self._task.close()

    def get(self, id: str) -> Migration | None:
        """One that has ended, and whose end may not be in the store yet."""
        session = self._sessions.get(id)
        return None if session is None else session.view()

    async def end(self, session: SourceSession) -> None:
        """Publish its end; bounded. What the store doesn't take is tried again later."""
        self._sessions[session.migration_id] = session
        if await self._publisher.end(session):
            self._published(session)
        else:
            self._late.add(session.migration_id)
            self._asked.set()

    def look_again(self, never_began: str) -> None:
        """The store may have that migration, whose `create` failed."""
        self._never_began.add(never_began)
        self._asked.set()

    async def _run(self) -> None:
        while True:
            try:
                await self._publish_all()
            except FerryError as error:
                log.warning("not all ends of migrations are published yet: %s", error)
                self._asked.set()
            await self._asked.wait()
            self._asked.clear()  # Before the pause: who asks in it gets a look that is late enough.
            await asyncio.sleep(AGAIN_S)

    async def _publish_all(self) -> None:
        """StoreError: some are left as they were."""
        never_began = set(self._never_began)
        for session in [self._sessions[each] for each in self._late]:
            await self._publisher.end_late(session)
            self._late.discard(session.migration_id)
            log.info("migration %s: its end is published", session.migration_id)
            self._published(session)
        for outline in await self._publisher.read_outlines():
            if not outline.ended and outline.source == self._node and self._is_left(outline):
                with contextlib.suppress(NotFoundError):
                    found = await self._publisher.read(outline.id)
                    if not found.ended:  # It may have, since the list was read.
                        self._unseen[outline.id] = self._ended(found)
        for ended in list(self._unseen.values()):
            await self._publisher.end_without_session(ended)
            del self._unseen[ended.id]
            if ended.id not in self._never_began:
                self._aside(self._after_unseen_end(ended))
        self._never_began -= never_began

    def _is_left(self, outline: MigrationOutline) -> bool:
        known = outline.id in self._sessions or outline.id in self._unseen
        return not (known or self._is_alive(outline))

    def _published(self, session: SourceSession) -> None:
        if self._sessions.pop(session.migration_id, None) is not None:
            self._aside(self._after_end(session))

    async def _after_end(self, session: SourceSession) -> None:
        if await self._moments.at_end(session):
            await self._publisher.end_timeline(session)  # With what the hooks did.

    async def _after_unseen_end(self, ended: Migration) -> None:
        with contextlib.suppress(NotFoundError):
            spec = (await self._records.get(DomainName(ended.domain))).spec
            await self._moments.at_unseen_end(ended, spec)

    def _ended(self, migration: Migration) -> Migration:
        entry = self._journal.get(migration.id)
        if entry is not None and entry.ended:
            state, error, ended_at_s = entry.state, entry.detail or None, entry.ended_at_s
            if entry.cancel is not None:
                migration = msgspec.structs.replace(migration, cancelled_by=entry.cancel.by)
        else:
            state, ended_at_s = MigrationState.FAILED, None
            why = "its agent ended before that, or had no answer from the store"
            error = f"it never began: {why}; nothing was changed"
        ended_at_s = ended_at_s or time.time()
        return msgspec.structs.replace(
            migration,
            state=state,
            progress=msgspec.structs.replace(migration.progress, state=state),
            error=error,
            ended_at_s=ended_at_s,
            total_s=max(ended_at_s - migration.created_at_s, 0.0),
        )
