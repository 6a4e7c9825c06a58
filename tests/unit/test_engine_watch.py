"""An engine that says nothing is told of, and no other one is."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from migrator import engine_watch
from migrator.engine_watch import PING_S, UNANSWERED_MAX, EngineWatch

ANSWERS, SILENT, NOBODY = "answers", "silent", "nobody"
HANGS = [SILENT] * UNANSWERED_MAX


@pytest.mark.parametrize(
    ("what", "told"),
    [
        ([ANSWERS] * 9, 0),
        (HANGS, 1),
        (HANGS[1:], 0),
        ([*HANGS[1:], ANSWERS] * 3, 0),
        ([*HANGS[1:], NOBODY, *HANGS[1:]], 0),
        ([NOBODY] * 9, 0),
        (HANGS + HANGS, 2),
        ([ANSWERS, *HANGS, ANSWERS, *HANGS], 2),
    ],
)
async def test_it_hangs_that_misses_some_answers_in_a_row(
    what: list[str], told: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_watch, "PING_S", 0.0)
    engine: Iterator[str] = iter(what)
    over = asyncio.Event()
    hung: list[float] = []

    def ask() -> bool:
        does = next(engine, None)
        if does is None:
            over.set()
        if does == ANSWERS:
            asyncio.get_running_loop().call_soon(watch.heard)
        return does not in (NOBODY, None)

    async def hangs(seconds: float) -> None:
        hung.append(seconds)

    watch = EngineWatch(ask, hangs)
    watch.begin()
    watch.begin()
    async with asyncio.timeout(20.0):
        await over.wait()
    await watch.close()
    assert len(hung) == told


def test_a_guest_waits_no_longer_for_it_than_for_a_silent_link() -> None:
    assert UNANSWERED_MAX * PING_S <= 30.0


async def test_what_never_began_is_closed() -> None:
    async def hangs(seconds: float) -> None: ...

    await EngineWatch(lambda: True, hangs).close()
