"""Who was refused, and why: logged and told for each after a minute, two, four and so on up to an
hour, however often it tries. A node with a certificate that has ended tries each second, for weeks
maybe, and the event log has room for other things, too.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Final

from migrator.ports import Struct

QUIET_S: Final = 60.0
LONGEST_QUIET_S: Final = 3600.0
"""Who was quiet himself for so long is told of as at first."""
REMEMBERED: Final = 256


class _Told(Struct, frozen=True, kw_only=True):
    at: float
    quiet_s: float
    """How long it isn't told of again."""
    tried_at: float


class RefusalLog:
    """`on_refusal` hears of each that is logged: (who, why)."""

    def __init__(
        self, log: logging.Logger, node: str, monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        self._log = log
        self._node = node
        self._monotonic = monotonic
        self._told: dict[tuple[str, str], _Told] = {}
        self.on_refusal: Callable[[str, str], None] = lambda who, why: None

    def note(self, who: str, why: str) -> None:
        """Log it, unless the same was logged a short while ago."""
        now, told = self._monotonic(), self._told.pop((who, why), None)
        if told is not None and now - told.tried_at >= LONGEST_QUIET_S:
            told = None
        tell = told is None or now - told.at >= told.quiet_s
        if told is None:
            told = _Told(at=now, quiet_s=QUIET_S, tried_at=now)
        elif tell:
            quiet_s = min(2 * told.quiet_s, LONGEST_QUIET_S)
            told = _Told(at=now, quiet_s=quiet_s, tried_at=now)
        else:
            told = _Told(at=told.at, quiet_s=told.quiet_s, tried_at=now)
        self._told[who, why] = told
        while len(self._told) > REMEMBERED:
            self._told.pop(next(iter(self._told)))
        if tell:
            self._log.warning("%s refused %s: %s", self._node, who, why)
            self.on_refusal(who, why)
