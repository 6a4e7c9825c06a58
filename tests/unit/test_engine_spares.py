"""An engine that waits takes nothing of the cores that anybody else wants, until it is taken."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

from migrator.engine.spares import NICENESS_WAITING, EngineSpares, session_niceness


async def niceness(pid: int) -> set[int]:
    """Of all its threads."""

    def look() -> set[int]:
        threads = [int(each.name) for each in Path(f"/proc/{pid}/task").iterdir()]
        return {os.getpriority(os.PRIO_PROCESS, thread) for thread in threads}

    return await asyncio.to_thread(look)


def session_niceness_of_a_waiting_one() -> int | None:
    """None where the kernel has no shares of sessions."""
    return NICENESS_WAITING if Path("/proc/self/autogroup").exists() else None


async def test_a_spare_starts_with_what_is_left_and_works_as_others_do(tmp_path: Path) -> None:
    spares = EngineSpares(tmp_path / "engines.log")
    try:
        spares.refill()
        async with asyncio.timeout(20.0):
            while spares._spare is None:  # noqa: ASYNC110 - it says nothing
                await asyncio.sleep(0.01)
        waiting = spares._spare
        assert await niceness(waiting.pid) == {NICENESS_WAITING}
        expected = await asyncio.to_thread(session_niceness_of_a_waiting_one)
        assert await asyncio.to_thread(session_niceness, waiting.pid) == expected
        taken = spares.take()
        assert taken is waiting
        assert await niceness(taken.pid) == {os.getpriority(os.PRIO_PROCESS, 0)}
        own = await asyncio.to_thread(session_niceness, os.getpid())
        assert await asyncio.to_thread(session_niceness, taken.pid) == own
        assert spares.take() is None
        await taken.stop(2.0)
    finally:
        await spares.close()
