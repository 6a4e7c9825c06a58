"""What only the SQLite store promises: one file, many processes, SIGKILL, foreign files."""

from __future__ import annotations

import asyncio
import os
import signal
import sqlite3
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from migrator.errors import StoreError
from node_agent.state.database import Database
from node_agent.state.sqlite import SqliteStore
from tests.contract.test_store_contract import opened, take

_CONTENDER = """
import asyncio, sys
from pathlib import Path
from node_agent.state.sqlite import SqliteStore

async def main() -> None:
    store = SqliteStore(Path(sys.argv[1]))
    await store.open()
    won = 0
    for _ in range(int(sys.argv[2])):
        while True:
            entry = await store.get("counter")
            old = int(entry.value) if entry else 0
            revision = entry.revision if entry else None
            if await store.put_if("counter", b"%d" % (old + 1), revision) is not None:
                won += 1
                break
    print(won)
    await store.close()

asyncio.run(main())
"""

_WRITER = """
import asyncio, sys
from pathlib import Path
from node_agent.state.sqlite import SqliteStore

async def main() -> None:
    store = SqliteStore(Path(sys.argv[1]))
    await store.open()
    number = 0
    while True:
        number += 1
        await store.put("d/a", b"%d" % number)
        print(number, flush=True)

asyncio.run(main())
"""


def _spawn(script: str, *arguments: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", script, *arguments], stdout=subprocess.PIPE, cwd=Path.cwd()
    )


async def test_processes_that_contend_lose_no_update(tmp_path: Path) -> None:
    path = tmp_path / "cluster.sqlite"
    store = SqliteStore(path)
    async with opened(store):
        changes = store.watch("counter")
        await store.get("counter")
        processes = [_spawn(_CONTENDER, str(path), "50") for _ in range(3)]
        counted = await take(changes, 150)
        for process in processes:
            output, _ = await asyncio.to_thread(process.communicate, timeout=30)
            assert output.strip() == b"50"
        assert counted == [("counter", b"%d" % number) for number in range(1, 151)]


async def test_what_was_answered_survives_sigkill(tmp_path: Path) -> None:
    path = tmp_path / "cluster.sqlite"
    process = await asyncio.to_thread(_spawn, _WRITER, str(path))
    assert process.stdout is not None
    answered = 0
    try:
        while answered < 100:
            answered = int(await asyncio.to_thread(process.stdout.readline))
    finally:
        os.kill(process.pid, signal.SIGKILL)
        rest, _ = await asyncio.to_thread(process.communicate)
    answered = int(rest.split()[-2]) if len(rest.split()) > 1 else answered
    store = SqliteStore(path)
    async with opened(store):
        entry = await store.get("d/a")
        assert entry is not None and int(entry.value) >= answered
        assert await store.put_if("d/a", b"x", entry.revision) is not None


async def test_a_held_write_lock_ends_in_store_error_and_blocks_no_loop(tmp_path: Path) -> None:
    path = tmp_path / "cluster.sqlite"
    store = SqliteStore(path, busy_timeout_s=0.2)
    async with opened(store):
        holder = sqlite3.connect(path, isolation_level=None)
        holder.execute("BEGIN IMMEDIATE")
        ticks = 0

        async def tick() -> None:
            nonlocal ticks
            while True:
                await asyncio.sleep(0.01)
                ticks += 1

        ticking = asyncio.create_task(tick())
        with pytest.raises(StoreError, match="locked"):
            await store.put("d/a", b"1")
        ticking.cancel()
        assert ticks  # None, had it waited for the lock in the loop.
        holder.execute("ROLLBACK")
        holder.close()
        assert await store.get("d/a") is None
        await store.put("d/a", b"1")


async def test_nobody_else_reads_what_is_in_it(tmp_path: Path) -> None:
    """Hooks' secrets are, and an earlier release made the file readable by all."""
    path = tmp_path / "cluster.sqlite"
    for _ in range(2):
        store = SqliteStore(path)
        async with opened(store):
            await store.put("d/a", b"1")
            modes = {each.stat().st_mode & 0o007 for each in os.scandir(tmp_path)}
            assert modes == {0}
        path.chmod(0o644)


async def test_a_foreign_file_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "other.sqlite"
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE other (x)")
    connection.close()
    path.chmod(0o644)
    with pytest.raises(StoreError, match="not Ferry's"):
        await SqliteStore(path).open()
    assert path.stat().st_mode & 0o777 == 0o644
    path.write_text("no database at all, but long enough to be looked at as one " * 20)
    with pytest.raises(StoreError, match="not a database"):
        await SqliteStore(path).open()


async def test_a_dropped_watch_is_forgotten(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "cluster.sqlite")
    async with opened(store):
        changes = store.watch("d/")
        await store.put("d/a", b"")
        assert len(store._watches) == 1
        del changes
        await store.put("d/a", b"")
        await store.get("d/a")
        assert store._watches == []


@pytest.mark.parametrize("reads", range(1, 4))
def test_two_agents_that_make_the_file_at_once_both_have_it(
    reads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever one has read by the time that the other has written the layout."""
    path = tmp_path / "cluster.sqlite"
    connect = sqlite3.connect
    asked: list[str] = []

    class Slow(sqlite3.Connection):
        def execute(self, sql: str, parameters: Any = (), /) -> sqlite3.Cursor:
            found = super().execute(sql, parameters)
            if "sqlite_master" in sql or sql in ("PRAGMA application_id", "PRAGMA user_version"):
                asked.append(sql)
                if len(asked) == reads and not self.in_transaction:
                    with monkeypatch.context() as usual:
                        usual.setattr(sqlite3, "connect", connect)
                        Database(path, 1.0).close()
            return found

    monkeypatch.setattr(sqlite3, "connect", partial(connect, factory=Slow))
    Database(path, 1.0).close()
    assert asked
