"""A token bucket: bytes may leave no faster than a rate that can change at any time."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Final

_BURST_S: Final = 0.02
"""How much unused time is saved up. Short, so that a cap holds over every quarter second."""


class TokenBucket:
    """Shared by all streams of an engine, from any thread. Clockless: `now` is in seconds."""

    def __init__(self, bytes_per_s: int | None, now: float) -> None:
        self._lock = threading.Lock()
        self._rate = bytes_per_s
        self._tokens = 0.0
        self._at = now
        self._users = 0

    @property
    def bytes_per_s(self) -> int | None:
        return self._rate

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """By one of the streams, until it has sent all that it has to."""
        with self._lock:
            self._users += 1
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1

    @property
    def sharers(self) -> int:
        """How many streams share the rate now; 1 where none does."""
        return max(1, self._users)

    def set_rate(self, bytes_per_s: int | None, now: float) -> None:
        """A debt from before is paid at the new rate. None lifts the cap."""
        with self._lock:
            self._refill(now)
            self._rate = bytes_per_s
            if bytes_per_s is None:
                self._tokens = 0.0

    def spend(self, count: int, now: float) -> None:
        """Take `count` bytes, going into debt where they aren't there."""
        with self._lock:
            self._refill(now)
            if self._rate is not None:
                self._tokens -= count

    def wait_s(self, now: float) -> float:
        """Seconds until the debt is paid; 0.0 when something may be sent."""
        with self._lock:
            self._refill(now)
            if self._rate is None or self._tokens > -1:  # Less than a byte is rounding.
                return 0.0
            return -self._tokens / self._rate

    def piece_bytes(self, largest: int) -> int:
        """How much to send at once, so that the flow is even: 20 ms' worth under a cap."""
        rate = self._rate
        return largest if rate is None else max(1, min(largest, int(rate * _BURST_S)))

    def _refill(self, now: float) -> None:
        elapsed = max(0.0, now - self._at)
        self._at = max(self._at, now)
        if self._rate is not None:
            self._tokens = min(self._tokens + elapsed * self._rate, self._rate * _BURST_S)
