"""What the source knows of its migrations' cutovers, put into their records as it comes.

The destination tells how the network followed, the source itself what it forwarded; either may come
first, and both may come before the migration's end is published.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import msgspec

from migrator.model import Cutover, Migration, MovedConnections
from migrator.ports import FirstFrames
from node_agent.migrations.publisher import Publisher


@dataclass(slots=True)
class CutoverRecord:
    """Of one migration, until its grace time is over."""

    published: bool = False
    """The migration's end is in the store: it may be amended."""
    cutover: Cutover | None = None
    problems: tuple[str, ...] = ()
    forwarded: int | None = None
    connections: MovedConnections | None = None


class CutoverRecords:
    """Of the migrations away from this node."""

    def __init__(self, publisher: Publisher) -> None:
        self._publisher = publisher
        self._records: dict[str, CutoverRecord] = {}

    def of(self, migration_id: str) -> CutoverRecord:
        """The migration's; a new one if need be."""
        return self._records.setdefault(migration_id, CutoverRecord())

    def forget(self, migration_id: str) -> None:
        """Idempotent."""
        self._records.pop(migration_id, None)

    async def amend(self, migration_id: str) -> None:
        """Put what is known into the migration's record, once that says how it ended. StoreError.

        Before the destination has told how the network followed, nothing.
        """
        record = self.of(migration_id)
        if record.cutover is None or not record.published:
            return
        cutover = msgspec.structs.replace(
            record.cutover,
            forwarded_frames=record.forwarded,
            connections=record.connections,
            problems=(*record.problems, *record.cutover.problems),
        )
        await self._publisher.amend(
            migration_id, lambda migration: msgspec.structs.replace(migration, cutover=cutover)
        )

    async def verified_late(self, migration_id: str, cutover: Cutover) -> None:
        """Long after its end: who found the guest, and when. The suspect stays told. StoreError."""

        def change(migration: Migration) -> Migration:
            if migration.cutover is None:
                return migration
            found = msgspec.structs.replace(
                migration.cutover, verified_ms=cutover.verified_ms, witnesses=cutover.witnesses
            )
            return msgspec.structs.replace(migration, cutover=found)

        await self._publisher.amend(migration_id, change)


def with_first(cutover: Cutover, first: FirstFrames) -> Cutover:
    """And the first frames each way. Pure."""

    def after_ms(at_s: float | None) -> float | None:
        return None if at_s is None else max(at_s - cutover.resumed_at_s, 0.0) * 1e3

    return msgspec.structs.replace(
        cutover,
        first_to_guest_ms=after_ms(first.to_guest_at_s),
        first_from_guest_ms=after_ms(first.from_guest_at_s),
    )


def seen_by(watching: asyncio.Task[FirstFrames]) -> FirstFrames:
    """What was seen; nothing where that goes on, or failed."""
    if not watching.done() or watching.cancelled() or watching.exception() is not None:
        return FirstFrames()
    return watching.result()
