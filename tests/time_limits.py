"""Limits that are over when a test says so.

So a test of what is late need not choose between a limit that is worth waiting for and one that a
busy machine exceeds before anything has begun.
"""

from __future__ import annotations

import asyncio

import pytest


class Limit:
    """The next `asyncio.timeout` of so many seconds."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
        self._entered: asyncio.Queue[asyncio.Timeout] = asyncio.Queue()
        make = asyncio.timeout

        def timeout(delay: float | None) -> asyncio.Timeout:
            made = make(delay)
            if delay == seconds:
                self._entered.put_nowait(made)
            return made

        monkeypatch.setattr(asyncio, "timeout", timeout)

    async def is_over(self) -> None:
        """Waits until the code under test has come to it."""
        entered = await self._entered.get()
        entered.reschedule(asyncio.get_running_loop().time())


class Sleeps:
    """From now on `asyncio.sleep` waits for nothing, but puts the running loop's clock forward."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        loop = asyncio.get_running_loop()
        sleep, time, ahead_s = asyncio.sleep, loop.time, 0.0

        async def skip(delay_s: float) -> None:
            nonlocal ahead_s
            ahead_s += delay_s
            await sleep(0)

        monkeypatch.setattr(loop, "time", lambda: time() + ahead_s)
        monkeypatch.setattr(asyncio, "sleep", skip)
