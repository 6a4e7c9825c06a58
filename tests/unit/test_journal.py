"""A node's journal: what it keeps and forgets, and what it says when the disk fails it."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from migrator import journal as journal_module
from migrator.errors import StoreError
from migrator.journal import MigrationJournal
from migrator.journal_entry import JournalEntry
from migrator.model import MigrationRequest, MigrationState, Role
from tests.unit.agent_world import spec_of


def entry(number: int, state: MigrationState = MigrationState.SETUP) -> JournalEntry:
    ended = state in (MigrationState.COMPLETED, MigrationState.FAILED)
    return JournalEntry(
        migration_id=f"m{number}",
        role=Role.SOURCE,
        spec=spec_of(),
        source="a",
        destination="b",
        token=1,
        request=MigrationRequest(destination="b"),
        created_at_s=float(number),
        state=state,
        ended_at_s=float(number) + 0.5 if ended else None,
    )


async def reopened(path: Path) -> list[JournalEntry]:
    journal = MigrationJournal(path)
    entries = await journal.open()
    await journal.close()
    return list(entries)


async def test_the_newest_entry_outlives_the_agent(tmp_path: Path) -> None:
    path = tmp_path / "state" / "journal.sqlite"
    journal = MigrationJournal(path)
    assert not await journal.open()
    await journal.write(entry(1))
    last = msgspec.structs.replace(entry(1), state=MigrationState.SWITCHOVER, committed=True)
    await journal.write(last, durable=False)
    assert journal.get("m1") == last
    assert journal.get("m2") is None
    assert {each.stat().st_mode & 0o077 for each in path.parent.iterdir()} == {0}
    await journal.close()
    await journal.close()
    assert await reopened(path) == [last]
    with pytest.raises(StoreError, match="closed"):
        await journal.write(entry(3))


async def test_ended_entries_are_forgotten_oldest_first_in_the_file_and_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal_module, "KEEP_ENDED", 2)
    journal = MigrationJournal(tmp_path / "j")
    await journal.open()
    await journal.write(entry(0))  # The oldest of all, but it has not ended.
    for number in (1, 2, 3):
        await journal.write(entry(number, MigrationState.COMPLETED))
    kept = {name for name in ("m0", "m1", "m2", "m3") if journal.get(name) is not None}
    await journal.close()
    assert kept == {"m0", "m2", "m3"}
    assert {each.migration_id for each in await reopened(tmp_path / "j")} == kept


async def test_what_ended_last_is_kept_though_the_clock_was_set_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else its destination would say that it never knew it, and its source would take it back."""
    monkeypatch.setattr(journal_module, "KEEP_ENDED", 2)
    journal = MigrationJournal(tmp_path / "j")
    await journal.open()
    for number in (1, 2, 3):
        await journal.write(ended(number, at_s=1e9))
    await journal.close()
    journal = MigrationJournal(tmp_path / "j")
    await journal.open()
    await journal.write(ended(4, at_s=1e8))
    kept = {name for name in ("m1", "m2", "m3", "m4") if journal.get(name) is not None}
    await journal.close()
    assert kept == {"m3", "m4"}
    assert [each.migration_id for each in await reopened(tmp_path / "j")] == ["m3", "m4"]


def ended(number: int, *, at_s: float) -> JournalEntry:
    completed = entry(number, MigrationState.COMPLETED)
    return msgspec.structs.replace(completed, created_at_s=at_s, ended_at_s=at_s)


async def test_an_unreadable_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "journal.sqlite"
    path.write_bytes(b"this is no database, but it is long enough to be taken for one" * 20)
    journal = MigrationJournal(path)
    with pytest.raises(StoreError, match=r"journal\.sqlite can't be used"):
        await journal.open()
    await journal.close()
