"""A volume that somebody else makes is gone again if what follows comes to nothing."""

from __future__ import annotations

import asyncio
import contextlib
import logging

import pytest

from migrator.errors import StorageError
from storage.half_made import made


class Maker:
    """Makes a volume once it may, and notes what it was asked for."""

    def __init__(self) -> None:
        self.may = asyncio.Event()
        self.volumes: list[str] = []
        self.fails: Exception | None = None

    async def make(self) -> None:
        await self.may.wait()
        self.volumes.append("web")

    async def delete(self) -> None:
        await asyncio.sleep(0)
        if self.fails is not None:
            raise self.fails
        self.volumes.remove("web")

    async def filled(self, error: Exception | None = None) -> None:
        async with made(self.make(), self.delete, "pool p: LUN web"):
            if error is not None:
                raise error


async def test_what_was_made_and_filled_stays() -> None:
    maker = Maker()
    maker.may.set()
    await maker.filled()
    assert maker.volumes == ["web"]


async def test_what_could_not_be_filled_is_deleted() -> None:
    maker = Maker()
    maker.may.set()
    with pytest.raises(StorageError, match="no room"):
        await maker.filled(StorageError("no room"))
    assert maker.volumes == []


async def test_a_making_that_was_given_up_goes_to_its_end_first() -> None:
    """However often who asked for it is cancelled."""
    maker = Maker()
    asking = asyncio.create_task(maker.filled())
    for _ in range(2):
        await asyncio.sleep(0)
        asking.cancel()
    await asyncio.sleep(0)
    assert not asking.done()
    maker.may.set()
    with contextlib.suppress(asyncio.CancelledError):
        await asking
    assert asking.cancelled()
    assert maker.volumes == []


async def test_who_asked_hears_why_also_where_it_cannot_be_deleted(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A block pool's hook that failed a second time hid the first reason."""
    maker = Maker()
    maker.may.set()
    maker.fails = StorageError("the target is away")
    with caplog.at_level(logging.ERROR), pytest.raises(StorageError, match="no room"):
        await maker.filled(StorageError("no room"))
    assert "pool p: LUN web is left half made: the target is away" in caplog.text
