"""The page streams as one channel: whether it is whole, and how a broken stream is mended.

connected ──breaks──► told as broken ─► dialled, ever more slowly ─► told as whole
                                          └── `patience_s` are over: ChannelLostError
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Final

from migrator.engine.control import ChannelLostError, Waiter
from migrator.engine.stream import PageStream, StreamBrokenError
from migrator.engine_messages import ChannelBroken, ChannelRestored, FromEngine

_BACKOFF_FIRST_S: Final = 0.02
_BACKOFF_MAX_S: Final = 1.0
_IN_VAIN_S: Final = 0.1


class ChannelHealth:
    """Tells the agent when the first stream breaks and when the last one is back."""

    def __init__(self, emit: Callable[[FromEngine], None]) -> None:
        self._emit = emit
        self._lock = threading.Lock()
        self._broken: set[int] = set()
        self._since = 0.0

    @property
    def broken_s(self) -> float:
        """How long the channel has been broken; 0.0 if it isn't."""
        with self._lock:
            return time.monotonic() - self._since if self._broken else 0.0

    def broke(self, index: int, reason: str) -> None:
        with self._lock:
            if not self._broken:
                self._since = time.monotonic()
                self._emit(ChannelBroken(reason=reason))
            self._broken.add(index)

    def stays_broken(self, index: int, reason: str) -> None:
        """It isn't to be had for a while now: that is told again, for the reason may be another."""
        with self._lock:
            if not self._broken:
                self._since = time.monotonic()
            self._broken.add(index)
            self._emit(ChannelBroken(reason=reason))

    def restored(self, index: int) -> None:
        with self._lock:
            if index in self._broken:
                self._broken.remove(index)
                if not self._broken:
                    self._emit(ChannelRestored(broken_s=time.monotonic() - self._since))


def reconnect(
    stream: PageStream, health: ChannelHealth, reason: str, patience_s: float, waiter: Waiter
) -> None:
    """Connect a broken stream again. ChannelLostError when `patience_s` is over.

    One that carried nothing may break as soon as it is made, for want of memory say: so that isn't
    done as fast as it goes.
    """
    stream.close()
    health.broke(stream.index, reason)
    if not stream.carries:
        waiter.wait(None, 0, _IN_VAIN_S)
    connect_patiently(stream, patience_s, waiter)
    health.restored(stream.index)


def connect_patiently(stream: PageStream, patience_s: float, waiter: Waiter) -> None:
    """Try until it works, ever more slowly. ChannelLostError, StreamRefusedError."""
    deadline = time.monotonic() + patience_s
    backoff_s = _BACKOFF_FIRST_S
    while True:
        try:
            return stream.connect(waiter)
        except StreamBrokenError as error:
            if time.monotonic() + backoff_s > deadline:
                raise ChannelLostError(
                    f"the destination's engine could not be reached for {patience_s:g} s: {error}"
                ) from error
        waiter.wait(None, 0, backoff_s)
        backoff_s = min(2 * backoff_s, _BACKOFF_MAX_S)
