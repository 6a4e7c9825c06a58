"""How many of the host's cores packing may have without taking any from another.

    waits for its migration   a window a second (`look`), so that the first frame knows
    is set up                 no window: that is a moment's work, of which the pass has nothing
    a pass                    windows of _APART_S, the first of which begins with it

What packing takes itself is told by whoever packs (`used`), and counts as idle. What the sending
thread takes doesn't: it is needed whether pages are packed or not.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

_APART_S: Final = 0.1
"""The kernel counts in hundredths of a second: a window tells no more than a tenth of a core."""
_SMOOTHING: Final = 0.5
"""A tenth of a second in which a hypervisor is started says little about the next ones."""


def idle_core_seconds() -> float:
    """Since the host's start, by /proc/stat. 0.0 without it."""
    try:
        fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()
        idle_ticks = int(fields[4]) + int(fields[5])  # proc(5): idle, iowait.
    except (OSError, IndexError, ValueError):
        return 0.0
    return idle_ticks / os.sysconf("SC_CLK_TCK")


class IdleCores:
    """Call it as often as you like: it looks now and then, and says what the last window had.

    The load average would know at once, but the past minute: a host that has just started a guest
    seems busy for that long.
    """

    def __init__(
        self,
        idle: Callable[[], float] = idle_core_seconds,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._idle, self._clock = idle, clock
        self._used_s = 0.0
        self._cores: float | None = None
        self._at_s = self._unused_s = 0.0
        self._mark()

    def __call__(self) -> float:
        """Cores; 0.0 while nothing is known."""
        self.look()
        return self._cores or 0.0

    def used(self, core_seconds: float) -> None:
        """Packing took so much: who stops has it to give."""
        self._used_s += core_seconds

    def look(self) -> None:
        """End the window, unless it is too short to tell."""
        at_s, unused_s = self._at_s, self._unused_s
        if self._clock() - at_s < _APART_S:
            return
        self._mark()
        found = max(0.0, (self._unused_s - unused_s) / (self._at_s - at_s))
        known = found if self._cores is None else self._cores
        self._cores = known + _SMOOTHING * (found - known)

    def begin(self) -> None:
        """The first pass does: only who knows nothing else learns from its set-up."""
        if self._cores is None:
            self.look()
        else:
            self._mark()

    def _mark(self) -> None:
        """A window begins."""
        self._at_s, self._unused_s = self._clock(), self._idle() + self._used_s
