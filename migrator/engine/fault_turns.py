"""How post-copy's bulk takes turns with the pages that vCPUs wait for, on the link they share.

A vCPU that runs into one missing page after another asks for the next a turnaround after the last
was answered: the page travels, is put in place, the vCPU goes on, and its request comes back. What
bulk sends right behind an answer is on the wire in that time, and out of the way when the next
answer follows. So the link stays full, and a fault's page waits for nothing:

    link     │answer│ bulk │answer│ bulk │answer│ ...
    vCPU            └ goes on, asks ┘

    bulk behind an answer = the link's rate x the turnaround - the answer's own bytes

The shortest turnaround of late counts: the others had the vCPU's own work in them, or stood behind
something. Where nobody asks for a while, bulk's queue alone is what bounds it (`short_queue`), and
so it is for a tenth of the time in any case: the link's rate can't be seen while bulk holds back.
"""

from __future__ import annotations

import collections
import threading
import time
from typing import Final, NamedTuple

from migrator.model import PAGE_SIZE_BYTES

QUIET_S: Final = 0.001
_QUIET_PAGES: Final = 3
"""After a request, and the time of so many pages on the link, the vCPU is at its own work, and
bulk needn't hold back. A link whose round trip takes longer isn't worth taking turns on."""
OPEN_S: Final = 0.15
"""For a window of `short_queue`, 0.1 s long."""
OPEN_EVERY_S: Final = 1.5
_TURNAROUNDS: Final = 64


class Turn(NamedTuple):
    """What bulk may hand to the kernel now."""

    size_bytes: int | None
    """0: nothing yet. None: as much as its queue may hold."""
    wait_s: float = 0.0
    """Where it is nothing: ask again after that, or when a fault was answered."""


FREE: Final = Turn(None)


class FaultClock:
    """Whose turn it is. Clockless: `now` is in seconds. Pure."""

    def __init__(self) -> None:
        self._asked_at_s = self._answered_at_s = self._given_at_s = float("-inf")
        self._opened_at_s = float("-inf")
        self._answer_bytes = 0
        self._waiting = False
        self._credit = False
        """A fault was answered, and nothing was given to bulk since."""
        self._turnarounds: collections.deque[float] = collections.deque(maxlen=_TURNAROUNDS)

    def asked(self, now: float) -> None:
        """A vCPU waits."""
        self._turnarounds.append(now - self._answered_at_s)
        self._asked_at_s = now
        self._waiting = True

    def answered(self, now: float, size_bytes: int) -> None:
        """Its page is the kernel's to send."""
        self._answered_at_s = now
        self._answer_bytes = size_bytes
        self._waiting = False
        self._credit = True

    def holds_back(self, now: float, bytes_per_s: float | None) -> bool:
        """Whether bulk goes by turns now. `bytes_per_s`: the link's rate; None: not known."""
        if bytes_per_s is None:
            return False
        if now - self._asked_at_s > QUIET_S + _QUIET_PAGES * PAGE_SIZE_BYTES / bytes_per_s:
            return False
        if now - self._opened_at_s > OPEN_EVERY_S:
            self._opened_at_s = now
        return now - self._opened_at_s > OPEN_S

    def turn(self, now: float, bytes_per_s: float | None) -> Turn:
        """What bulk may send now; it is taken as sent."""
        if bytes_per_s is None or not self.holds_back(now, bytes_per_s):
            return FREE
        since_given_s = now - self._given_at_s
        if self._waiting and since_given_s < QUIET_S:
            return Turn(0, QUIET_S - since_given_s)
        turnaround_s = min(QUIET_S, *self._turnarounds)
        size = max(PAGE_SIZE_BYTES, int(bytes_per_s * turnaround_s) - self._answer_bytes)
        lasts_s = max(turnaround_s, size / bytes_per_s)
        if not self._credit and since_given_s < lasts_s:
            return Turn(0, lasts_s - since_given_s)
        self._given_at_s = now
        self._credit = False
        return Turn(size)


class FaultTurns:
    """The same for the two threads: one answers faults, the other sends bulk."""

    def __init__(self) -> None:
        self._clock = FaultClock()
        self._changed = threading.Condition()

    def asked(self) -> None:
        """See `FaultClock`."""
        with self._changed:
            self._clock.asked(time.monotonic())

    def answered(self, size_bytes: int) -> None:
        """See `FaultClock`."""
        with self._changed:
            self._clock.answered(time.monotonic(), size_bytes)
            self._changed.notify()

    def holds_back(self, bytes_per_s: float | None) -> bool:
        """See `FaultClock`."""
        with self._changed:
            return self._clock.holds_back(time.monotonic(), bytes_per_s)

    def wait(self, bytes_per_s: float | None) -> int | None:
        """Until it is bulk's turn, some milliseconds at most. What it may send; None: any."""
        with self._changed:
            while True:
                turn = self._clock.turn(time.monotonic(), bytes_per_s)
                if turn.size_bytes != 0:
                    return turn.size_bytes
                self._changed.wait(turn.wait_s)
