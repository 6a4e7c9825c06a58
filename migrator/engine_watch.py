"""Whether a post-copy's engine still answers.

That an engine has ended is told by the kernel. That it hangs (somebody's SIGSTOP, a deadlock, a
page of its own that its disk doesn't give back) is told by nobody, and its guest waits for pages.
So it is asked every second. One answer alone may be late: a host that was suspended, or whose
cores are taken, has engines that say nothing for a moment.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Final

PING_S: Final = 1.0
UNANSWERED_MAX: Final = 15
"""In a row; then it hangs. A guest has waited for its pages for that long."""
FIRST_WORD_S: Final = 60.0
"""From its configuration: that an engine's imports may take, on a host whose cores or disks are
busy. What it is configured with may have to be waited for, too, and that isn't the engine's fault.
"""
FIRST_WORD_S_A_GIB: Final = 0.5
"""Of the guest, beyond that: before its first word a successor looks for what is missing. That
takes 0.02 s, and 0.4 where every other page is."""
PASS_S_A_GIB: Final = 0.1
"""Of the guest: what an engine may say nothing for in a pass, beyond UNANSWERED_MAX, as it looks
for what was written and adds it up. That takes 0.005 s, and 0.05 where every other page was."""
ASKED_MAX: Final = 60
"""Questions into a silence, whose socket has an end. Whoever comes to answers one of them."""
UNHEARD_S: Final = 3.0
"""After which its silence is told. In a pass it reports five times a second; in a post-copy it has
nothing to say, perhaps, but an answer each second."""


def excused_s(guest_bytes: int, *, spoke: bool, in_pass: bool) -> float:
    """For how long an engine may say nothing before it counts that it doesn't answer.

    While a guest waits for its pages, which is in no pass, it looks through nothing: 0.0.
    """
    gib = guest_bytes / 1024**3
    if not spoke:
        return FIRST_WORD_S + FIRST_WORD_S_A_GIB * gib
    return PASS_S_A_GIB * gib if in_pass else 0.0


class EngineWatch:
    """Whoever owns it tells it what the engine says, and closes it."""

    def __init__(self, ask: Callable[[], bool], hangs: Callable[[float], Awaitable[None]]) -> None:
        """`ask`: False where there is no engine that should answer. `hangs`: told for how many
        seconds it has said nothing, and again each time that it says nothing for as long again.
        """
        self._ask = ask
        self._hangs = hangs
        self._answered = False
        self._in_pass = False
        self._heard_at = time.monotonic()
        self._task: asyncio.Task[None] | None = None

    def begin(self) -> None:
        """Idempotent."""
        self._heard_at = time.monotonic()
        if self._task is None:
            self._task = asyncio.create_task(self._watch(), name="engine-watch")

    def heard(self) -> None:
        """The engine has said something, whatever it was."""
        self._answered = True
        self._heard_at = time.monotonic()

    def pass_runs(self, runs: bool) -> None:
        """One was begun, or it is over."""
        self._in_pass = runs
        self._heard_at = time.monotonic()

    @property
    def unheard_s(self) -> float | None:
        """For how long the engine has said nothing; None: it speaks, or needn't."""
        if not self._in_pass and self._task is None:
            return None
        silent_s = time.monotonic() - self._heard_at
        return silent_s if silent_s > UNHEARD_S else None

    async def close(self) -> None:
        """Idempotent."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    async def _watch(self) -> None:
        unanswered = 0
        while True:
            self._answered = False
            asked = self._ask()
            await asyncio.sleep(PING_S)
            unanswered = 0 if self._answered or not asked else unanswered + 1
            if unanswered >= UNANSWERED_MAX:
                unanswered = 0
                await self._hangs(UNANSWERED_MAX * PING_S)
