"""The wall clock for the length of one migration: it never goes back, and nobody can set it.

An NTP client that steps a host's clock in the midst would else make a blackout of a day, or a pass
of no time. What others say of the moment (a hypervisor's events) is told by its age.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

HEARD_WITHIN_S: Final = 60.0


class SteadyClock:
    """Seconds since the epoch as the wall clock had it at the start, plus the monotonic clock."""

    def __init__(
        self,
        wall: Callable[[], float] | None = None,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        """`wall`: by default the host's."""
        self._wall = wall or time.time
        self._monotonic = monotonic
        self._started_wall_s = self._wall()
        self._started_monotonic = monotonic()

    @property
    def now_s(self) -> float:
        """Now, by this clock."""
        return self._started_wall_s + (self._monotonic() - self._started_monotonic)

    def of(self, at_s: float) -> float:
        """What the wall clock called `at_s`, a while ago, by this clock."""
        return self.now_s - max(self._wall() - at_s, 0.0)

    def heard(self, at_s: float) -> float:
        """The same of an event that is heard just now: one that seems old was stamped by a clock
        that has been set since."""
        return self.of(at_s) if self._wall() - at_s < HEARD_WITHIN_S else self.now_s
