"""The runner's lanes: order, ending, and draining."""

from __future__ import annotations

import asyncio
import time

from migrator.lane import Lane


async def test_one_at_a_time_in_order_and_an_error_stops_nobody() -> None:
    said: list[str] = []

    async def work(name: str, *, fails: bool = False) -> None:
        said.append(f"{name} begins")
        await asyncio.sleep(0)
        if fails:
            raise ZeroDivisionError
        said.append(f"{name} ends")

    lane = Lane("test")
    lane.put(work("a"))
    lane.put(work("b", fails=True))
    lane.put(work("c"))
    await lane.drained(5.0)
    assert said == ["a begins", "a ends", "b begins", "c begins", "c ends"]
    await lane.drained(5.0)


async def test_clear_ends_what_runs_and_what_comes_after_waits_for_its_cleaning_up() -> None:
    said: list[str] = []

    async def slow() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0.01)
            said.append("cleaned up")

    async def then(name: str) -> None:
        said.append(name)

    lane = Lane("test")
    lane.put(slow())
    lane.put(then("forgotten"))
    await asyncio.sleep(0)
    lane.clear()
    lane.put(then("after"))
    await lane.drained(5.0)
    assert said == ["cleaned up", "after"]


async def test_draining_is_bounded() -> None:
    lane = Lane("test")
    lane.put(asyncio.sleep(60))
    started = time.monotonic()
    await lane.drained(0.05)
    assert time.monotonic() - started < 10.0
    await lane.close()
    await lane.drained(5.0)
