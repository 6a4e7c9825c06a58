"""An engine that says nothing is told of, and no other one is."""

from __future__ import annotations

import asyncio
import time
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


@pytest.mark.parametrize(
    ("does", "silent_s", "told"),
    [
        ("nothing", 99.0, False),
        ("pass", 2.0, False),
        ("pass", 4.0, True),
        ("pass that is over", 99.0, False),
        ("post-copy", 2.0, False),  # It has nothing to say between two questions.
        ("post-copy", 4.0, True),
    ],
)
async def test_a_silence_is_told_while_it_should_speak(
    does: str, silent_s: float, told: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def hangs(seconds: float) -> None: ...

    now = time.monotonic()
    watch = EngineWatch(lambda: True, hangs)
    if does == "post-copy":
        watch.begin()
    elif does != "nothing":
        watch.pass_runs(does == "pass")
    with monkeypatch.context() as patch:
        patch.setattr(time, "monotonic", lambda: now + silent_s)
        unheard_s = watch.unheard_s
        assert unheard_s is None if not told else unheard_s == pytest.approx(silent_s, abs=0.5)
        watch.heard()
        assert watch.unheard_s is None
    await watch.close()


async def test_what_never_began_is_closed() -> None:
    async def hangs(seconds: float) -> None: ...

    await EngineWatch(lambda: True, hangs).close()
