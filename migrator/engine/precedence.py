"""The sending thread goes first on its core, for as long as it mostly waits for its link.

On a host whose cores are taken a thread that was woken waits until another's turn is over. To the
sending one that happens at each of its waits, and the link stands idle meanwhile: for a quarter of
a pass on two cores with two emulated guests (docs/measurements.md). It has little to do at a time,
so with real-time priority it takes from the others what it would have got later anyway.

That is so where the link is slow, and only there. A thread that is its own bottleneck would take a
core from the guest, so precedence is asked for on slow links only (`Delivery`), and a thread that
uses more than a share of its time has none for a while, whatever it does.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from typing import Final

_WINDOW_S: Final = 0.05
_SHARE_MAX: Final = 0.7
"""Of a core, over a window. Sending at 1 Gbit/s takes 0.3 to 0.5 of a slow core."""
_LOWEST_REAL_TIME: Final = 1
"""Goes before all that isn't real-time, and after all that is."""


def go_first(first: bool) -> bool:
    """This thread before all that isn't real-time, or no more. False: the kernel refuses.

    What is started by it doesn't inherit that. The kernel refuses without CAP_SYS_NICE, and in
    control groups that have no real-time share (CONFIG_RT_GROUP_SCHED).
    """
    # The flag stays where a limit (RLIMIT_RTPRIO) gave both: only CAP_SYS_NICE takes it back.
    usual = (os.SCHED_OTHER, os.SCHED_OTHER | os.SCHED_RESET_ON_FORK)
    for policy in (os.SCHED_RR | os.SCHED_RESET_ON_FORK,) if first else usual:
        with contextlib.suppress(OSError):
            os.sched_setscheduler(0, policy, os.sched_param(_LOWEST_REAL_TIME if first else 0))
            return True
    return False


class Precedence:
    """One thread's. Call `keep` as often as you like, and `end` at the end, in that thread."""

    def __init__(
        self,
        give: Callable[[bool], bool] = go_first,
        clock: Callable[[], float] = time.monotonic,
        core_time: Callable[[], float] = time.thread_time,
    ) -> None:
        self._give, self._clock, self._core_time = give, clock, core_time
        self._has = False
        self._refused = False
        self._modest = True
        self._window: tuple[float, float] | None = None
        """When it began: by the clock, and by what the thread had used by then."""

    def keep(self, wanted: bool) -> None:
        """Have precedence, or don't: as `wanted` for the link, and what the thread uses allows."""
        if self._refused:
            return
        self._look()
        self._set(wanted and self._modest)

    def end(self) -> None:
        """As it was before. Idempotent."""
        self._set(False)
        self._window = None

    def _look(self) -> None:
        now = self._clock()
        if self._window is not None and now - self._window[0] < _WINDOW_S:
            return
        used_s = self._core_time()
        if self._window is not None:
            since, used_before_s = self._window
            self._modest = used_s - used_before_s <= _SHARE_MAX * (now - since)
        self._window = now, used_s

    def _set(self, first: bool) -> None:
        if first == self._has:
            return
        if self._give(first):
            self._has = first
        else:
            self._refused = True
