"""The journal of migrations on a disk that has filled up since the agent's start."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from migrator.journal import MigrationJournal
from migrator.model import MigrationState
from tests.contract.storage_servers import fill, small_file_system
from tests.unit.test_journal import entry

pytestmark = pytest.mark.lab

MIB = 2**20
COURSE = (MigrationState.SETUP, MigrationState.PRECOPY, *[MigrationState.SWITCHOVER] * 5)
AT_ONCE = 8


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    with small_file_system(tmp_path / "state", 8 * MIB) as made:
        yield made


async def test_migrations_are_written_down_to_their_ends_though_the_disk_is_full(
    folder: Path,
) -> None:
    """A destination that had won its guest could neither resume it nor give it back: the guest
    stood still until somebody made room."""
    journal = MigrationJournal(folder / "journal.sqlite")
    await journal.open()
    for number in range(AT_ONCE):
        await journal.write(entry(number, MigrationState.CREATED))
    fill(folder)
    for state in COURSE:
        for number in range(AT_ONCE):
            await journal.write(entry(number, state), durable=number % 2 == 0)
    for number in range(AT_ONCE):
        await journal.write(entry(number, MigrationState.COMPLETED))
    for number in range(AT_ONCE, 100):  # None begins on a full disk; those ends have left room.
        await journal.write(entry(number, MigrationState.SWITCHOVER), durable=False)
        await journal.write(entry(number, MigrationState.COMPLETED))
    await journal.close()
    again = MigrationJournal(folder / "journal.sqlite")
    assert {each.state for each in await again.open()} == {MigrationState.COMPLETED}
    await again.close()


async def test_an_agent_starts_on_a_disk_that_has_no_room_to_take(folder: Path) -> None:
    journal = MigrationJournal(folder / "journal.sqlite")
    await journal.open()
    await journal.write(entry(1, MigrationState.SETUP))
    await journal.close()
    filler = fill(folder)
    with filler.open("r+b") as file:
        file.truncate(filler.stat().st_size - 256 * 1024)
    again = MigrationJournal(folder / "journal.sqlite")
    (known,) = await again.open()
    assert known == entry(1, MigrationState.SETUP)
    last = msgspec.structs.replace(known, state=MigrationState.PRECOPY)
    await again.write(last)
    assert again.get("m1") == last
    await again.close()
