"""Who was refused, and why: logged and told once a minute for each, however often it tries."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Final

QUIET_S: Final = 60.0
REMEMBERED: Final = 256


class RefusalLog:
    """`on_refusal` hears of each that is logged: (who, why)."""

    def __init__(
        self, log: logging.Logger, node: str, monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        self._log = log
        self._node = node
        self._monotonic = monotonic
        self._last: dict[tuple[str, str], float] = {}
        self.on_refusal: Callable[[str, str], None] = lambda who, why: None

    def note(self, who: str, why: str) -> None:
        """Log it, unless the same was logged within the last minute."""
        now = self._monotonic()
        last = self._last.pop((who, why), None)
        self._last[who, why] = now if last is None or now - last >= QUIET_S else last
        while len(self._last) > REMEMBERED:
            self._last.pop(next(iter(self._last)))
        if self._last[who, why] == now:
            self._log.warning("%s refused %s: %s", self._node, who, why)
            self.on_refusal(who, why)
