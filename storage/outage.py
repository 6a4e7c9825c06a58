"""Since when a server hasn't answered this node, as far as it was asked; in words."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

TOLD_FROM_S: Final = 1.0
"""A shorter one has just begun: nothing is said of its length."""


class Outage:
    """One server's. `answered` and `failed` are told by whoever calls it, from any thread."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._since_s: float | None = None

    def answered(self) -> None:
        self._since_s = None

    def failed(self) -> str:
        """Note it. How long it has lasted, to be appended to why; "" if it has just begun."""
        now_s = self._clock()
        if self._since_s is None:
            self._since_s = now_s
        for_s = now_s - self._since_s
        return f"; it hasn't answered this node for {for_s:.0f} s" if for_s >= TOLD_FROM_S else ""
