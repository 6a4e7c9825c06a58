"""How fast the link is, and whether it is what a stream waits for.

The kernel knows both (TCP_INFO): how long the stream had data to send, for how much of that the
destination's window held it up, and what was acknowledged meanwhile. A window of time in which
there mostly was something to send, and the destination was ready to take it, gives the link's rate.

    busy, destination ready      the link is the bottleneck: its rate is known
    busy, destination not ready  the destination is: fewer bytes on the wire would not help it
    not busy                     the source is, or a bandwidth cap: nothing is learnt
"""

from __future__ import annotations

import socket
import struct
from typing import Final, Protocol

import msgspec

_WINDOW_S: Final = 0.02
_WINDOW_BYTES_MIN: Final = 256 * 1024
_BUSY_SHARE: Final = 0.5
"""Of a window: with less to send it tells nothing of the link."""
_RECEIVER_SHARE: Final = 0.1
_IDLE_WINDOWS_MAX: Final = 16
"""After so many windows in which the stream wasn't busy, the link may be faster than it was."""
_SMOOTHING: Final = 0.5

_TCP_INFO_BYTES: Final = 192
# linux/tcp.h, struct tcp_info: bytes_acked, notsent_bytes and min_rtt; busy_time and rwnd_limited.
# Times in microseconds; a min_rtt that isn't known has all bits set.
_BYTES: Final = struct.Struct("=Q16xII")
_BYTES_OFFSET: Final = 120
_UNKNOWN_US: Final = 0xFFFF_FFFF
_TIMES: Final = struct.Struct("=QQ")
_TIMES_OFFSET: Final = 168


class TcpFigures(msgspec.Struct, frozen=True):
    """What a connection did since it was made."""

    acknowledged_bytes: int
    queued_bytes: int
    """Accepted by the kernel and not sent yet, now."""
    busy_s: float
    """With something to send."""
    receiver_limited_s: float
    """Of that, held up by the other side's window."""
    round_trip_s: float = 0.0
    """The shortest of late; 0.0: not known."""
    beside_bytes: int = 0
    """What others have sent on the same link: who knows of it adds it."""


class HasOptions(Protocol):
    """A TCP socket, or what is made of one."""

    def getsockopt(self, level: int, name: int, size: int, /) -> bytes: ...


def tcp_figures(sock: HasOptions) -> TcpFigures | None:
    """The kernel's figures; None where it keeps none (no TCP, Linux before 4.10)."""
    try:
        data = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_BYTES)
    except OSError:
        return None
    if len(data) < _TCP_INFO_BYTES:
        return None
    acknowledged, queued, round_trip_us = _BYTES.unpack_from(data, _BYTES_OFFSET)
    busy_us, receiver_us = _TIMES.unpack_from(data, _TIMES_OFFSET)
    round_trip_s = 0.0 if round_trip_us == _UNKNOWN_US else round_trip_us / 1e6
    return TcpFigures(acknowledged, queued, busy_us / 1e6, receiver_us / 1e6, round_trip_s)


class Window(msgspec.Struct, frozen=True):
    """What a connection did in a stretch of time."""

    seconds: float
    acknowledged_bytes: int
    busy_s: float
    receiver_limited_s: float
    beside_bytes: int = 0

    @property
    def throughput(self) -> float:
        """Bytes a second, of all that were sent on the link."""
        return (self.acknowledged_bytes + self.beside_bytes) / self.seconds

    @property
    def link_bytes_per_s(self) -> float:
        """What the link carries: the connection's own bytes count for the time in which it had any
        to send. That of others counts as spread over the window."""
        return self.acknowledged_bytes / self.busy_s + self.beside_bytes / self.seconds

    @property
    def busy(self) -> bool:
        """Whether there mostly was something to send."""
        return self.busy_s >= _BUSY_SHARE * self.seconds


class Windows:
    """A connection's time, cut into windows. Clockless: `now` is in seconds. Pure."""

    def __init__(self, seconds_min: float, bytes_min: int) -> None:
        """A window is as long at least, and has as many bytes acknowledged."""
        self._seconds_min = seconds_min
        self._bytes_min = bytes_min
        self._since_s = 0.0
        self._since: TcpFigures | None = None

    def restart(self) -> None:
        """Forget what has begun."""
        self._since = None

    def note(self, now: float, figures: TcpFigures | None) -> Window | None:
        """Look at the figures; cheap enough for every frame. The window that ends now, if any."""
        since = self._since
        if figures is None or since is None or figures.busy_s == since.busy_s:
            # Nothing to send since: a window begins when there is.
            self._since_s, self._since = now, figures
            return None
        seconds = now - self._since_s
        count = figures.acknowledged_bytes - since.acknowledged_bytes
        if seconds < self._seconds_min or count < self._bytes_min:
            return None
        self._since_s, self._since = now, figures
        return Window(
            seconds,
            count,
            figures.busy_s - since.busy_s,
            figures.receiver_limited_s - since.receiver_limited_s,
            figures.beside_bytes - since.beside_bytes,
        )


class LinkGauge:
    """One stream's view of its link. Clockless: `now` is in seconds. Pure."""

    def __init__(self) -> None:
        self.expected_bytes_per_s: float | None = None
        """By earlier streams, until this one has windows of its own: a busy one, or two others."""
        self.bytes_per_s: float | None = None
        """None: not known, or not what holds the stream up."""
        self.queued_bytes = 0
        self._windows = Windows(_WINDOW_S, _WINDOW_BYTES_MIN)
        self._idle_windows = 0
        self.judged = False
        """Whether there was a window at all."""

    def restart(self) -> None:
        """Forget the window, not the rate: the stream stood idle, or is a new connection."""
        self._windows.restart()

    @property
    def queued_s(self) -> float:
        """For how long the link has enough to do; 0.0 if its rate isn't known."""
        return self.queued_bytes / self.bytes_per_s if self.bytes_per_s else 0.0

    def note(self, now: float, figures: TcpFigures | None) -> None:
        """Look at the figures; cheap enough for every frame."""
        self.queued_bytes = 0 if figures is None else figures.queued_bytes
        window = self._windows.note(now, figures)
        if window is None:
            return
        self.judged = True
        if window.busy or self._idle_windows:
            self.expected_bytes_per_s = None
        if not window.busy:
            self._idle_windows += 1
            if self._idle_windows >= _IDLE_WINDOWS_MAX:
                self._idle_windows = 0
                self.bytes_per_s = None
            return
        self._idle_windows = 0
        if window.receiver_limited_s > _RECEIVER_SHARE * window.busy_s:
            self.bytes_per_s = None
            return
        rate = window.link_bytes_per_s
        if self.bytes_per_s is None:
            self.bytes_per_s = rate
        else:
            self.bytes_per_s += _SMOOTHING * (rate - self.bytes_per_s)
