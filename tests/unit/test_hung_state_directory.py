"""The agent's own disk hangs, or takes no writes any more: what stands still, and what is said."""

from __future__ import annotations

import asyncio
import errno
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from migrator import durable
from migrator.errors import StoreError
from node_agent import state_file
from node_agent.migrations import room
from node_agent.migrations.room import room_reasons
from node_agent.restart_notes import RestartFile, RestartNotes

MORE_THAN_A_LOOP_HAS = 40
"""asyncio's own threads are 32 at most."""


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Until it is set, the disk hangs."""
    monkeypatch.setattr(room, "LOOK_S", 0.05)
    monkeypatch.setattr(state_file, "DISK_S", 0.05)
    event = threading.Event()
    yield event
    event.set()


async def test_one_that_hangs_is_told_and_takes_no_thread_of_anybody_else(
    tmp_path: Path, answers: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each question took one of the threads that the heartbeat needs: the node seemed dead."""
    monkeypatch.setattr(os, "fsync", lambda _: answers.wait(60))
    async with asyncio.timeout(10):
        found = await asyncio.gather(*(room_reasons(tmp_path) for _ in range(MORE_THAN_A_LOOP_HAS)))
        assert await asyncio.to_thread(lambda: "the heartbeat") == "the heartbeat"
    assert {len(each) for each in found} == {1}
    assert "gives no answer within 0.05 s: its disk hangs" in found[0][0]


async def test_one_that_takes_no_writes_has_room_and_is_told_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As ext4 is remounted after an error of its disk; found out in the middle of a migration."""
    assert await room_reasons(tmp_path) == []

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "open", refuse)
    reason = f"its state directory {tmp_path} can't be used: Read-only file system"
    assert await room_reasons(tmp_path) == [reason]


async def test_what_is_lost_is_settled_though_it_can_not_be_noted(
    tmp_path: Path, answers: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sweep waited for that note for ever, and saw no stale copy any more."""
    written: list[bytes] = []

    def replace(_: Path, content: bytes) -> None:
        answers.wait(60)
        written.append(content)

    monkeypatch.setattr(durable, "replace", replace)
    file = RestartFile(tmp_path / "restarts.json")
    for boot in ("1", "2"):
        async with asyncio.timeout(5):
            with pytest.raises(StoreError, match=r"restarts.json can't be written: its disk gave"):
                await file.save(RestartNotes(boot_id=boot))
    answers.set()
    monkeypatch.setattr(state_file, "DISK_S", 5.0)
    await file.save(RestartNotes(boot_id="3"))
    kept = [b'"1"' in written[0], b'"3"' in written[-1], len(written)]
    assert kept == [True, True, 2], "what came too late was never begun, and overwrites nothing"
