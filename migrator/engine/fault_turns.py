"""How post-copy's bulk takes turns with the pages that vCPUs wait for, on the link they share.

A vCPU that runs into one missing page after another asks for the next a while after the last one
was sent: it is put in place, the vCPU goes on, its request comes back and is answered. What bulk
sends right behind an answer is on the wire in that time, and gone when the next answer follows. So
the link stays full, and a fault's page waits for nothing:

    link     │answer│ bulk │answer│ bulk │answer│ ...
    vCPU            └ goes on, asks ┘

What was handed to the kernel, and the link's rate, tell when the link is free again; the pauses
between answers, how long it would be idle. A later answer finds one small piece of bulk before it.
It costs a part of the link's time, for threads wake up late, so it is done where the link is most
of what a fault waits for. Where it isn't, and where nobody asks for a while, bulk's queue alone is
what bounds it (`short_queue`); so it is for a tenth of the time in any case: the link's rate can't
be seen while bulk holds back.
"""

from __future__ import annotations

import collections
import statistics
import threading
import time
from typing import Final, NamedTuple

from migrator.model import PAGE_SIZE_BYTES

QUIET_S: Final = 0.001
_QUIET_PAGES: Final = 3
"""That, and the time of so many pages on the link, after a request: the vCPU is at its own work,
and bulk needn't hold back. A link whose round trip takes longer isn't worth taking turns on. Nor is
bulk kept waiting for longer, by however many vCPUs."""
OPEN_S: Final = 0.15
"""For a window of `short_queue`, 0.1 s long."""
OPEN_EVERY_S: Final = 1.5
_SETTLE_S: Final = 0.03
"""Then what bulk had queued meanwhile is gone."""
_RATE_SHARE: Final = 0.96
"""Of the link's rate as it was measured, which may be 3 % off: a queue that grows is worse."""
_PIECE_S: Final = 0.0001
"""What bulk sends at once where no answer is due: threads can't take turns any faster."""
_LEAD_S: Final = 0.000_05
"""A thread takes so long to wake up: bulk's, before the link is free; an answer's, when it is due.
"""
_PAUSES: Final = 32
_PAUSE_ANSWERS_MAX: Final = 8.0
"""A pause that would carry more answers than that is the hosts' time, and not the link's: at 1
Gbit/s, with two cores for two emulated guests, it is 0.3 to 0.8 ms, and bulk has 0.75 of the link
where it takes turns. At 200 Mbit/s it is 0.07 to 0.25 ms, and 0.85."""


class Turn(NamedTuple):
    """What bulk may hand to the kernel now."""

    size_bytes: int | None
    """0: nothing yet. None: as much as its queue may hold."""
    wait_s: float = 0.0
    """Where it is nothing: ask again after that, or when a fault was answered."""


FREE: Final = Turn(None)


class FaultClock:
    """Whose turn it is. Clockless: `now` is in seconds. Pure.

    `bytes_per_s`: the link's rate; None: not known.
    """

    def __init__(self) -> None:
        self._asked_at_s = self._given_at_s = float("-inf")
        self._open_until_s = self._next_open_s = float("-inf")
        self._waiting = False
        self._free_at_s = self._left_at_s = float("-inf")
        """All that was handed over is on its way by then; and the last answer is."""
        self._pauses_s: collections.deque[float] = collections.deque(maxlen=_PAUSES)
        """From an answer that is on its way to the next one, since bulk holds back."""

    def asked(self, now: float) -> None:
        """A vCPU waits."""
        self._asked_at_s = now
        self._waiting = True
        if now >= self._next_open_s:
            self._open_until_s, self._next_open_s = now + OPEN_S, now + OPEN_EVERY_S
            self._pauses_s.clear()

    def answered(self, now: float, size_bytes: int, bytes_per_s: float | None) -> None:
        """Its page is the kernel's to send."""
        self._waiting = False
        if bytes_per_s is None:
            return
        if self._open_until_s + _SETTLE_S < now < self._next_open_s:
            self._pauses_s.append(min(max(0.0, now - self._left_at_s), QUIET_S))
            answer_s = size_bytes / bytes_per_s
            if len(self._pauses_s) == _PAUSES and self._pause_s > _PAUSE_ANSWERS_MAX * answer_s:
                self._open_until_s = self._next_open_s
        self._left_at_s = self._hand_over(now, size_bytes, bytes_per_s)

    def holds_back(self, now: float, bytes_per_s: float | None) -> bool:
        """Whether bulk goes by turns now."""
        if bytes_per_s is None or now - self._asked_at_s > _patience_s(bytes_per_s):
            return False
        return now > self._open_until_s

    def turn(self, now: float, bytes_per_s: float | None) -> Turn:
        """What bulk may send now; it is taken as sent."""
        if bytes_per_s is None or not self.holds_back(now, bytes_per_s):
            return FREE
        due_at_s = self._left_at_s + self._pause_s
        page_s = PAGE_SIZE_BYTES / bytes_per_s
        idle_s = due_at_s - max(now, self._free_at_s)
        starved_in_s = self._given_at_s + _patience_s(bytes_per_s) - now
        if starved_in_s > 0:
            if self._waiting:
                return Turn(0, starved_in_s)
            ready_in_s = max(self._free_at_s - _LEAD_S, due_at_s + _LEAD_S) - now
            if idle_s < 0.5 * page_s and ready_in_s > 0:
                return Turn(0, min(ready_in_s, starved_in_s))
        size = int(max(idle_s, page_s, _PIECE_S) * _RATE_SHARE * bytes_per_s)
        self._given_at_s = now
        self._hand_over(now, size, bytes_per_s)
        return Turn(size)

    @property
    def _pause_s(self) -> float:
        return statistics.median(self._pauses_s) if self._pauses_s else 0.0

    def _hand_over(self, now: float, size_bytes: int, bytes_per_s: float) -> float:
        lasts_s = size_bytes / (_RATE_SHARE * bytes_per_s)
        self._free_at_s = max(now, self._free_at_s) + lasts_s
        return self._free_at_s


def _patience_s(bytes_per_s: float) -> float:
    return QUIET_S + _QUIET_PAGES * PAGE_SIZE_BYTES / bytes_per_s


class FaultTurns:
    """The same for the two threads: one answers faults, the other sends bulk."""

    def __init__(self) -> None:
        self._clock = FaultClock()
        self._changed = threading.Condition()

    def asked(self) -> None:
        """See `FaultClock`."""
        with self._changed:
            self._clock.asked(time.monotonic())

    def answered(self, size_bytes: int, bytes_per_s: float | None) -> None:
        """See `FaultClock`."""
        with self._changed:
            self._clock.answered(time.monotonic(), size_bytes, bytes_per_s)
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
