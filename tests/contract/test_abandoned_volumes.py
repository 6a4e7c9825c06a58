"""What agents that died left half made goes after a day, by the storage's own clock."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from migrator.model import DiskFormat, PoolName, VolumeName
from storage.directory import DirectoryPool


async def test_a_node_whose_clock_is_ahead_removes_nothing_that_another_makes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now_s = time.time()
    monkeypatch.setattr(time, "time", lambda: now_s + 365 * 86_400.0)
    others = tmp_path / ".a.raw.1.tmp"
    others.touch()
    pool = DirectoryPool(PoolName("p"), tmp_path)
    await pool.create(VolumeName("disk"), capacity_bytes=2**20, format=DiskFormat.RAW)
    assert others.exists()
