"""An engine's commands, each in its turn."""

from __future__ import annotations

import asyncio
import gc

from migrator.errors import EngineError
from migrator.turns import Turns


def turns(lost: list[str]) -> Turns:
    return Turns("test", lost.append, 5.0)


async def test_each_begins_when_the_one_before_has_ended_however_that_went() -> None:
    lost: list[str] = []
    told: list[str] = []
    gate = asyncio.Event()
    ours = turns(lost)

    async def first() -> None:
        await gate.wait()
        told.append("first")
        raise EngineError("it died")

    async def then(name: str) -> None:
        told.append(name)
        raise OSError(24, "Too many open files") if name == "second" else EngineError(name)

    ours.put("start", first())
    ours.put("connect", then("second"))
    ours.put("stop", then("third"))
    ours.beside(asyncio.sleep(0))
    await asyncio.sleep(0)
    assert told == []
    gate.set()
    await ours.drained()
    assert told == ["first", "second", "third"]
    assert lost == [
        "start: it died",
        "connect: [Errno 24] Too many open files",
        "stop: third",
    ]


async def test_to_close_ends_what_runs_and_what_waits() -> None:
    """Nothing is left that was never awaited: that would be a warning, and so an error."""
    lost: list[str] = []
    ended: list[str] = []
    ours = turns(lost)

    async def long(name: str) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(name)

    ours.put("start", long("first"))
    ours.put("connect", long("second"))
    await asyncio.sleep(0)
    ours.put("stop", long("third"))  # Ended before it began.
    await ours.close()
    gc.collect()
    assert (ended, lost) == (["first"], [])


async def test_what_nobody_foresaw_is_told_too() -> None:
    """Or its session would wait for it."""
    lost: list[str] = []
    ours = turns(lost)

    async def unforeseen() -> None:
        raise RuntimeError("can't start new thread")

    ours.put("start", unforeseen())
    await ours.drained()
    assert lost == ["start: RuntimeError: can't start new thread"]
