"""Publishes the migrations of this node's sources: `migrations/ID` in the store, and events.

A migration's progress changes many times a second; the store gets it at most once a second, and
every change of state at once. While the guest stands still nothing is written at all: the store's
disk then belongs to the ownership record.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import Callable, Sequence
from typing import Final

import msgspec

from migrator.errors import FerryError, NotFoundError
from migrator.model import Migration, MigrationState
from migrator.session.source import SourceSession
from node_agent.background import Background
from node_agent.events import EventKind, EventLog
from node_agent.migrations.outline import MigrationOutline, outline_of
from node_agent.resources import MIGRATIONS
from node_agent.state.typed import TypedStore

log = logging.getLogger(__name__)

INTERVAL_S: Final = 1.0
KEEP: Final = 1_000
"""That have ended, in the store."""
OWN_MAX: Final = 10_000
_TRIES: Final = 5
_QUIET: Final = frozenset({MigrationState.SWITCHOVER, MigrationState.HANDOFF})
_WAITING: Final = frozenset({MigrationState.RECOVERING, MigrationState.POSTCOPY})
"""The guest has left, and may stand still: then why is told, too."""
_REASONS_MAX: Final = 5
"""Told in such a state."""
_NUMBER: Final = re.compile(r"\d+")
_ENDS: Final = {
    MigrationState.COMPLETED: EventKind.MIGRATION_COMPLETED,
    MigrationState.CANCELLED: EventKind.MIGRATION_CANCELLED,
    MigrationState.FAILED: EventKind.MIGRATION_FAILED,
}


class Publisher:
    """See the module. `open` starts the writer, `close` ends it."""

    def __init__(
        self,
        store: TypedStore,
        events: EventLog,
        *,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._events = events
        self._monotonic = monotonic
        self._states: dict[str, MigrationState] = {}
        self._reasons: dict[str, set[str]] = {}
        """Told by migration, without their numbers: they count seconds."""
        self._dirty: dict[str, SourceSession] = {}
        self._written_at: dict[str, float] = {}
        self._own: dict[str, MigrationOutline] = {}
        """Of what this agent has published, and once read, of what its predecessors have."""
        self._own_read = False
        self._writing = asyncio.Lock()
        """One after the other, each as of its turn: an older view never comes last."""
        self._wakeup = asyncio.Event()
        self._task = Background("migration-publisher")

    def open(self) -> None:
        self._task.start(self._run())

    async def close(self) -> None:
        await self._task.close()

    async def read(self, id: str) -> Migration:
        """NotFoundError if there is none."""
        entry = await self._store.get(f"{MIGRATIONS}{id}", Migration)
        if entry is None:
            raise NotFoundError(f"there is no migration {id}")
        return entry.value

    async def read_all(self) -> Sequence[Migration]:
        """Newest first."""
        entries = await self._store.list_prefix(MIGRATIONS, Migration)
        migrations = [entry.value for entry in entries]
        return sorted(migrations, key=lambda migration: migration.created_at_s, reverse=True)

    async def read_outlines(self) -> Sequence[MigrationOutline]:
        """The same, of each what tells whether it is under way."""
        entries = await self._store.list_parts(MIGRATIONS, MigrationOutline)
        outlines = [entry.value for entry in entries]
        return sorted(outlines, key=lambda outline: outline.created_at_s, reverse=True)

    async def read_own(self, node: str) -> Sequence[MigrationOutline]:
        """Of those whose source this node, `node`, is: what the store had at the first call, and
        all since, though the store may have dropped them; the newest `OWN_MAX`. Only the first call
        reads the store.
        """
        if not self._own_read:
            stored = {each.id: each for each in reversed(await self.read_outlines())}
            ours = {name: each for name, each in stored.items() if each.source == node}
            self._own = {**ours, **self._own}
            self._own_read = True
        return list(self._own.values())

    async def write(self, migration: Migration) -> None:
        """Publish now."""
        await self._put(lambda: migration)

    async def amend(self, id: str, change: Callable[[Migration], Migration]) -> None:
        """Change what is published of a migration that has ended. NotFoundError if it is gone.

        The hooks' and the network's ends are noted side by side: neither undoes the other.
        """
        async with self._writing:
            await self._store.put(f"{MIGRATIONS}{id}", change(await self.read(id)))

    async def end_timeline(self, session: SourceSession) -> None:
        """What was noted in its timeline since its end was published."""
        timeline = session.view().timeline
        await self.amend(
            session.migration_id, lambda ended: msgspec.structs.replace(ended, timeline=timeline)
        )

    async def _put(self, view: Callable[[], Migration]) -> None:
        async with self._writing:
            await self._put_now(view())

    async def _put_now(self, migration: Migration) -> None:
        await self._store.put(f"{MIGRATIONS}{migration.id}", migration)
        self._own[migration.id] = outline_of(migration)
        while len(self._own) > OWN_MAX:
            del self._own[next(iter(self._own))]

    def changed(self, session: SourceSession) -> None:
        """From the runner, after each event. Never waits."""
        name, state = session.migration_id, session.shown_state
        if state in _QUIET:
            self._dirty.pop(name, None)
            return
        new_state = self._states.get(name) is not state
        self._states[name] = state
        new_reason = state in _WAITING and self._is_new(name, session.error or "")
        if (new_state or new_reason) and state not in _ENDS:
            why = f": {session.error}" if session.error else ""
            self._events.emit(
                EventKind.MIGRATION_STATE,
                f"domain {session.domain}: migration is in {state}{why}",
                domain=session.domain,
                migration=name,
                state=state.value,
            )
        if new_state or self._monotonic() - self._written_at.get(name, 0.0) >= INTERVAL_S:
            self._dirty[name] = session
            self._wakeup.set()

    def _is_new(self, name: str, reason: str) -> bool:
        if not reason:
            return False
        told = self._reasons.setdefault(name, set())
        said = _NUMBER.sub("", reason)
        if said in told or len(told) >= _REASONS_MAX:
            return False
        told.add(said)
        return True

    async def end(self, session: SourceSession) -> bool:
        """Tell the end, and publish it: whether that was done. It is tried a few times, for the
        domain is kept meanwhile; after that it is for `end_late`.
        """
        name = session.migration_id
        self._dirty.pop(name, None)
        self._states.pop(name, None)
        self._reasons.pop(name, None)
        self._written_at.pop(name, None)
        view = session.view()
        published = await self._write_end(view)
        self._tell_end(view)
        return published

    async def _write_end(self, view: Migration) -> bool:
        for attempt in range(_TRIES):
            if attempt:
                await asyncio.sleep(2.0 ** (attempt - 1))
            try:
                await self.write(view)
            except FerryError as error:
                log.error("migration %s: its end was not published: %s", view.id, error)
            else:
                await self._prune()
                return True
        return False

    async def end_late(self, session: SourceSession) -> None:
        """Publish what `end` couldn't, and has told. StoreError: it may be published, or not."""
        name = session.migration_id
        async with self._writing:
            stored = await self._store.get(f"{MIGRATIONS}{name}", Migration)
            # The network's part may have been noted before this.
            cutover = None if stored is None else stored.value.cutover
            await self._put_now(msgspec.structs.replace(session.view(), cutover=cutover))
        await self._prune()

    async def end_without_session(self, ended: Migration) -> None:
        """Publish, and then tell, the end of a migration whose session nobody has any more.

        StoreError: it may be published, or not, and isn't told.
        """
        await self.write(ended)
        self._tell_end(ended)
        await self._prune()

    def _tell_end(self, view: Migration) -> None:
        by = {"by": view.cancelled_by} if view.cancelled_by else {}
        self._events.emit(
            _ENDS[view.state], _sentence(view), domain=view.domain, migration=view.id, **by
        )

    async def _prune(self) -> None:
        """Never fails: the next end does it, too."""
        try:
            await self._drop_oldest()
        except FerryError as error:
            log.warning("migrations that ended long ago were not dropped: %s", error)

    async def _drop_oldest(self) -> None:
        entries = await self._store.list_parts(MIGRATIONS, MigrationOutline)
        ended = sorted(
            (entry for entry in entries if entry.value.ended),
            key=lambda entry: entry.revision,  # Nodes' clocks differ.
        )
        for entry in ended[: max(0, len(ended) - KEEP)]:
            await self._store.delete_if(f"{MIGRATIONS}{entry.value.id}", entry.revision)

    async def _run(self) -> None:
        while True:
            await self._wakeup.wait()
            self._wakeup.clear()
            while self._dirty:
                name, session = self._dirty.popitem()
                self._written_at[name] = self._monotonic()
                try:
                    await self._put(session.view)
                except FerryError as error:  # The next change tries again.
                    log.warning("migration %s was not published: %s", name, error)


def _sentence(migration: Migration) -> str:
    route = f"domain {migration.domain}: migration from {migration.source}"
    route += f" to {migration.destination}"
    if migration.state is MigrationState.COMPLETED:
        blackout = (
            "" if migration.blackout_ms is None else f", blackout {migration.blackout_ms:.1f} ms"
        )
        return f"{route} completed in {migration.total_s or 0.0:.2f} s{blackout}"
    if migration.state is MigrationState.CANCELLED and migration.cancelled_by:
        return f"{route} was cancelled by {migration.cancelled_by}"
    return f"{route} {migration.state}: {migration.error}"
