"""How long the agent's event loop was ever kept from its work, measured all the time.

A loop waits in its selector; what lies between a return of `select` and the next call is the
callbacks' time, in which nobody else is served. So the selector is where a block can be measured
exactly, at the price of two readings of the clock a turn, without any timer that wakes an idle
agent:

    with asyncio.Runner(loop_factory=monitored_loop) as runner: ...
    loop_monitor.current().longest_ms

A process that the kernel doesn't schedule counts too, where that happens amid callbacks.
"""

from __future__ import annotations

import asyncio
import selectors
import time
import weakref
from collections import deque
from typing import Final

from node_agent.resources import LoopBlock

NOTED_MS: Final = 5.0
"""A turn of the loop that took longer is kept with its time."""
KEPT: Final = 64


class LoopMonitor(selectors.DefaultSelector):
    """A selector that measures its loop. Read it from the loop's own thread."""

    def __init__(self) -> None:
        super().__init__()
        self.reset()

    def reset(self) -> None:
        """Forget what was, like the work of a start; the current turn counts from now."""
        self.longest_ms = 0.0
        self.blocks: deque[LoopBlock] = deque(maxlen=KEPT)
        self._since = time.monotonic()

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        milliseconds = (time.monotonic() - self._since) * 1e3
        if milliseconds > NOTED_MS:
            self.blocks.append(LoopBlock(ended_at_s=time.time(), milliseconds=milliseconds))
        if milliseconds > self.longest_ms:
            self.longest_ms = milliseconds
        try:
            found: list[tuple[selectors.SelectorKey, int]] = super().select(timeout)
            return found
        finally:
            self._since = time.monotonic()


_monitors: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, LoopMonitor] = (
    weakref.WeakKeyDictionary()
)


def monitored_loop() -> asyncio.AbstractEventLoop:
    """An event loop that measures itself; for `asyncio.Runner`."""
    monitor = LoopMonitor()
    loop = asyncio.SelectorEventLoop(monitor)
    _monitors[loop] = monitor
    return loop


def current() -> LoopMonitor | None:
    """The running loop's monitor; None: it isn't a monitored one."""
    return _monitors.get(asyncio.get_running_loop())
