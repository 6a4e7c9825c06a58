"""How much post-copy's bulk may have under way: enough to fill the link, and hardly more. Pure.

A page that a vCPU waits for has a stream of its own, but the link is one: it waits behind all that
bulk has queued there. So bulk's send buffer is kept as small as the link's rate allows:

    bytes under way = rate x (round trip + slack)

The slack is what both sides need to go on sending. It shrinks while the rate stays, and doubles
when the rate falls. At first, and once a second, twice as much may be under way for a tenth of a
second: if that gains anything the link carries more than was known, and the next is doubled, too.
"""

from __future__ import annotations

from typing import Final

import msgspec

from migrator.engine.link import TcpFigures, Window, Windows
from migrator.model import PAGE_SIZE_BYTES

BYTES_MIN: Final = 2 * PAGE_SIZE_BYTES
BYTES_MAX: Final = 4 * 1024 * 1024
BYTES_FIRST: Final = 32 * 1024
"""Until the rate is known: 1.3 ms of a link of 200 Mbit/s."""
SLACK_FIRST_S: Final = 0.0005
SLACK_MIN_S: Final = 0.00025
"""The links of the benchmark stayed full with it; below, two pages are what bounds."""
SLACK_MAX_S: Final = 0.01
_WINDOW_S: Final = 0.1
_WINDOW_BYTES_MIN: Final = 64 * 1024
_SHRINK: Final = 0.7
_LOW_SHARE: Final = 0.85
"""Of the usual rate: where two windows in a row are below it, the buffer may be too small."""
_GAIN_SHARE: Final = 1.08
"""Of the usual rate: where twice the bytes under way gain so much, the buffer was too small. Most
windows of 0.1 s are within 3 % of each other (200 Mbit/s and 1 Gbit/s, shaped)."""
_SMOOTHING: Final = 0.3
_PROBE_WINDOWS: Final = 10
_HOLD_WINDOWS: Final = 10


class ShortQueue:
    """One connection's bound. Clockless: `now` is in seconds."""

    def __init__(self) -> None:
        self.bytes = BYTES_FIRST
        """What may be under way."""
        self._slack_s = SLACK_FIRST_S
        self._bytes_per_s = 0.0
        """Of the link. Smoothed, as the next; 0.0: not known yet."""
        self._usual = 0.0
        """Bytes a second that went through."""
        self._windows = Windows(_WINDOW_S, _WINDOW_BYTES_MIN)
        self._judged = 0
        self._hold = 0
        self._low = 0
        self._probing = False
        """Twice as much may be under way now."""

    @property
    def bytes_per_s(self) -> float | None:
        """The link's rate; None: not known yet."""
        return self._bytes_per_s or None

    def restart(self) -> None:
        """Forget the window: what was sent in it isn't what the link could carry."""
        self._windows.restart()

    def note(self, now: float, figures: TcpFigures | None, beside_bytes: int = 0) -> bool:
        """Look at the figures; cheap enough for every answer. Whether `bytes` has changed.

        `beside_bytes`: what was sent so far by the stream that shares the link.
        """
        if figures is not None:
            figures = msgspec.structs.replace(figures, beside_bytes=beside_bytes)
        window = self._windows.note(now, figures)
        if figures is None or window is None or not window.busy:
            return False  # Where little was asked for, the link's rate isn't what was seen.
        before = self.bytes
        self._judge(window)
        fitting = self._bytes_per_s * (figures.round_trip_s + self._slack_s)
        if self._probing:
            fitting *= 2
        self.bytes = max(BYTES_MIN, min(int(fitting), BYTES_MAX))
        return self.bytes != before

    def _judge(self, window: Window) -> None:
        """Whether the buffer was too small in it; and what the link carries.

        Both sides may have waited for a core meanwhile, with nothing to send: that makes what went
        through less than the link's rate, which others rely on, and isn't the buffer's fault.
        """
        through = window.throughput
        usual = self._usual or through
        self._low = self._low + 1 if through < _LOW_SHARE * usual else 0
        gained = self._probing and through > _GAIN_SHARE * usual
        if gained or self._low > 1:
            self._slack_s = min(2 * self._slack_s, SLACK_MAX_S)
            self._hold = _HOLD_WINDOWS
        elif self._hold:
            self._hold -= 1
        elif not self._low:
            self._slack_s = max(_SHRINK * self._slack_s, SLACK_MIN_S)
        self._probing = gained or self._judged % _PROBE_WINDOWS == 0
        self._judged += 1
        share = 1.0 if gained else _SMOOTHING
        self._usual = usual + share * (through - usual)
        rate = window.link_bytes_per_s
        before = self._bytes_per_s or rate
        self._bytes_per_s = before + share * (rate - before)
