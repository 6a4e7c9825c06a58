"""What is published of a migration is never older than what was published before."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import msgspec

from migrator.model import Migration, MigrationMode, MigrationRequest, MigrationState
from node_agent.migrations.publisher import Publisher
from tests.unit.session_pair import SessionPair


class SlowStore:
    """The first write takes its time."""

    def __init__(self) -> None:
        self.first = asyncio.Event()
        self.begun = asyncio.Event()
        self.done = asyncio.Event()
        self.kept: Migration | None = None

    async def put(self, _key: str, migration: Migration) -> None:
        if not self.begun.is_set():
            self.begun.set()
            await self.first.wait()
            self.done.set()
        self.kept = migration

    async def list_parts(self, *_: object) -> list[Any]:
        return []


class NoEvents:
    def emit(self, *_: object, **__: object) -> None: ...


async def test_a_slow_write_of_progress_does_not_come_after_the_end() -> None:
    pair = SessionPair()
    pair.run()
    session = pair.source
    assert session.state is MigrationState.COMPLETED
    store = SlowStore()
    publisher = Publisher(cast(Any, store), cast(Any, NoEvents()))
    publisher.open()
    try:
        publisher.changed(session)
        async with asyncio.timeout(10):
            await store.begun.wait()
            session.timeline.append(session.timeline[-1])
            end = asyncio.create_task(publisher.end(session))
            await asyncio.sleep(0)
            store.first.set()
            await store.done.wait()
            await end
        assert store.kept == session.view()
    finally:
        await publisher.close()


class OneMigration:
    """A store that has one, and takes its time to say so."""

    def __init__(self, migration: Migration) -> None:
        self.kept = migration

    async def get(self, *_: object) -> Any:
        found = self.kept
        await asyncio.sleep(0.01)
        return SimpleNamespace(value=found)

    async def put(self, _key: str, migration: Migration) -> None:
        self.kept = migration


async def test_what_is_noted_side_by_side_after_the_end_is_all_kept() -> None:
    """The network's verification and the hooks' end undid each other, as it happened."""
    pair = SessionPair()
    pair.run()
    session = pair.source
    store = OneMigration(session.view())
    publisher = Publisher(cast(Any, store), cast(Any, NoEvents()))
    session.timeline.append(msgspec.structs.replace(session.timeline[-1], name="hooks"))
    await asyncio.gather(
        publisher.amend(
            session.migration_id, lambda it: msgspec.structs.replace(it, cancelled_by="network")
        ),
        publisher.end_timeline(session),
    )
    assert store.kept.cancelled_by == "network"
    assert store.kept.timeline[-1].name == "hooks"


class Told:
    """The events."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def emit(self, _kind: object, text: str, **_: object) -> None:
        self.texts.append(text)


def test_why_a_guest_that_has_left_stands_still_is_told_once_a_reason() -> None:
    pair = SessionPair(MigrationRequest(destination="n2", mode=MigrationMode.POSTCOPY))
    pair.run()
    session, told = pair.source, Told()
    assert session.state is MigrationState.POSTCOPY
    publisher = Publisher(cast(Any, None), cast(Any, told))
    for error in (None, "no pages for 5 s", None, "no pages for 17 s", "refused", None, "refused"):
        session.error = error
        publisher.changed(session)
    assert [text.partition("postcopy")[2] for text in told.texts] == [
        "",
        ": no pages for 5 s",
        ": refused",
    ]
    for number in range(100):
        session.error = "x" * number
        publisher.changed(session)
    assert len(told.texts) < 10
