"""How fast bytes leave, for the reports: over the time since the last one, and no other.

A time in which nothing could leave (a blackout, a standstill) belongs to no speed. What leaves
first after it came at an unknown moment of its window, which has none, therefore; the next has one.
"""

from __future__ import annotations

from typing import Final

WINDOW_S: Final = 0.2
"""Of a report. The shortest that has a speed worth the name."""


class Speed:
    """Fed with how many bytes have left in all. Pure."""

    def __init__(self) -> None:
        self._since_s = 0.0
        self._before_bytes = 0
        self._flowing = False

    def begin(self, now_s: float, sent_bytes: int, *, flowing: bool) -> None:
        """A new window. `flowing`: bytes leave from now on, and not some time later."""
        self._since_s, self._before_bytes, self._flowing = now_s, sent_bytes, flowing

    def is_due(self, now_s: float) -> bool:
        """The window is long enough."""
        return now_s - self._since_s >= WINDOW_S

    def stands(self, sent_bytes: int) -> bool:
        """Nothing has left in this window."""
        return sent_bytes == self._before_bytes

    def measure(self, now_s: float, sent_bytes: int) -> float | None:
        """Bytes a second of the window, which ends here; None: it has no speed (see the module)."""
        speed = (sent_bytes - self._before_bytes) / (now_s - self._since_s)
        known = self._flowing
        self.begin(now_s, sent_bytes, flowing=True)
        return speed if known else None
