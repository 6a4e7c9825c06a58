"""Engines that wait come after everybody else at the cores, until they are taken."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from migrator.cores import WAITING, group_niceness
from migrator.engine.spares import SPARES, EngineSpares

OWN = os.getpriority(os.PRIO_PROCESS, 0)


async def niceness(pid: int) -> set[int | None]:
    """Of all its threads, and of the group that its session is."""

    def look() -> set[int | None]:
        threads = [int(each.name) for each in Path(f"/proc/{pid}/task").iterdir()]
        found: set[int | None] = {group_niceness(pid)} - {None}
        return found | {os.getpriority(os.PRIO_PROCESS, thread) for thread in threads}

    return await asyncio.to_thread(look)


@asynccontextmanager
async def spares_in(folder: Path) -> AsyncIterator[EngineSpares]:
    spares = EngineSpares(folder / "engines.log")
    try:
        yield spares
    finally:
        await spares.close()
        assert spares.waiting == ()


async def quiet(spares: EngineSpares) -> int:
    """How many wait when none is being started any more."""
    async with asyncio.timeout(30.0):
        while spares._task or spares._later:  # noqa: ASYNC110 - it says nothing
            await asyncio.sleep(0.01)
    return len(spares.waiting)


async def test_a_spare_starts_after_everybody_else_and_works_as_others_do(tmp_path: Path) -> None:
    async with spares_in(tmp_path) as spares:
        spares.refill()
        assert await quiet(spares) == SPARES
        for pid in spares.waiting:
            assert await niceness(pid) == {WAITING}
        waiting = spares.waiting[0]
        taken = await spares.take()
        assert taken is not None
        assert taken.pid == waiting
        assert await niceness(taken.pid) == {OWN}
        await taken.stop(2.0)


async def test_beside_a_lone_migration_none_is_started_beside_several_one_is(
    tmp_path: Path,
) -> None:
    async with spares_in(tmp_path) as spares:
        spares.refill()
        await quiet(spares)
        first = await spares.take()
        assert await quiet(spares) == SPARES - 1
        second = await spares.take()
        assert await quiet(spares) == 1
        spares.refill()
        assert await quiet(spares) == SPARES
        assert first is not None
        assert second is not None
        pids = {first.pid, second.pid, *spares.waiting}
        assert len(pids) == 2 + SPARES
        await asyncio.gather(first.stop(2.0), second.stop(2.0))


async def test_none_is_started_while_a_guest_recovers_from_its_move(tmp_path: Path) -> None:
    async with spares_in(tmp_path) as spares:
        spares.refill_later()
        await asyncio.sleep(0)
        assert spares._task is None
        spares.refill()
        assert await quiet(spares) == SPARES
        spares.refill_later()


async def test_more_are_wanted_while_one_starts(tmp_path: Path) -> None:
    async with spares_in(tmp_path) as spares:
        assert await spares.take() is None
        assert spares._task is not None
        spares.refill()
        assert await quiet(spares) == SPARES


async def test_one_that_has_died_is_nobody_s_engine(tmp_path: Path) -> None:
    async with spares_in(tmp_path) as spares:
        assert await spares.take() is None
        assert await quiet(spares) == 1
        spares.refill()
        await quiet(spares)
        dead, alive = spares._waiting
        dead.kill()
        async with asyncio.timeout(30.0):
            while dead.running:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        taken = await spares.take()
        assert taken is alive
        await taken.stop(2.0)
