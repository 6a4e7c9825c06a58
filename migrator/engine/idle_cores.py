"""How many of the host's cores this process may have without taking any from another."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

_APART_S: Final = 0.05
"""The kernel counts in hundredths of a second: a window tells no more than a fifth of a core."""


def unused_core_seconds() -> float:
    """Since the start: what was idle, by /proc/stat, and what this process used. 0.0 without."""
    try:
        fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()
        idle_ticks = int(fields[4]) + int(fields[5])  # proc(5): idle, iowait.
    except (OSError, IndexError, ValueError):
        return 0.0
    return idle_ticks / os.sysconf("SC_CLK_TCK") + time.process_time()


class IdleCores:
    """Call it as often as you like: it looks now and then, and says what the last window had.

    The load average would know at once, but the past minute: a host that has just started a guest
    seems busy for that long. So the first window is the time from here to the first pass, and each
    pass begins a window of its own (`restart`).
    """

    def __init__(
        self,
        look: Callable[[], float] = unused_core_seconds,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._look, self._clock = look, clock
        self._at_s = clock()
        self._unused_s = look()
        self._cores = 0.0

    def __call__(self) -> float:
        """Cores; 0.0 while nothing is known."""
        if self._clock() - self._at_s >= _APART_S:
            self.restart()
        return self._cores

    def restart(self) -> None:
        """End the window, however long it was; of one that was too short nothing is learnt."""
        now, unused_s = self._clock(), self._look()
        if now - self._at_s >= _APART_S:
            self._cores = max(0.0, (unused_s - self._unused_s) / (now - self._at_s))
        self._at_s, self._unused_s = now, unused_s
